from contract import MethodContract


class TestNaive(MethodContract):
    method = "naive"
