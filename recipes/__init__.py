"""The recipe files, installed as `hf_continual.recipe_files`."""
