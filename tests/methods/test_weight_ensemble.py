from contract import MethodContract


class TestWeightEnsemble(MethodContract):
    method = "weight_ensemble"
