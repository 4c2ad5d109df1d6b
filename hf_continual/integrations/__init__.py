"""The same mixin over the trainers of other packages; each module needs its package."""
