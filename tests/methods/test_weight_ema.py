from contract import MethodContract


class TestWeightEma(MethodContract):
    method = "weight_ema"
