from contract import MethodContract


class TestTaSL(MethodContract):
    method = {"name": "tasl"}


class TestTaSLRank1Memory(MethodContract):
    method = {"name": "tasl", "units": "matrix", "replay_count": 8, "every_n_steps": 2, "average": "run"}
