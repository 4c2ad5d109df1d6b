from contract import MethodContract


class TestKIF(MethodContract):
    method = "kif"


class TestKIFMatrix(MethodContract):
    method = {"name": "kif", "units": "matrix", "timing": "consistent"}


class TestKIFMemory(MethodContract):
    method = {"name": "kif", "replay_count": 4, "replay_learning_rate": 0.005, "space": "products"}
