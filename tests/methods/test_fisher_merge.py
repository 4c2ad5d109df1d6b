from contract import MethodContract


class TestFisherMerge(MethodContract):
    method = "fisher_merge"
