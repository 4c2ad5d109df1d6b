"""`hf-continual estimate` on a model without weights."""

import pytest
from toy_runs import save_model, write_recipe

from hf_continual.cli import main


def test_parts_of_a_toy_recipe_and_whether_it_fits(tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "80GB"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("weights", "gradients", "optimizer", "activations", "method state", "yes"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "1e6"]) == 0
    assert " no " in capsys.readouterr().out


@pytest.mark.parametrize("size", ["80XB", "-1GB", ""])
def test_a_size_that_is_none_is_refused(size, tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", size]) == 2
    assert "gpu_memory" in capsys.readouterr().err


def test_the_preset_it_would_be_launched_with(tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    command = ["estimate", str(recipe), "--gpus", "2", "--gpu_memory", "1GB", "--accelerate_config"]
    assert main([*command, "zero3"]) == 0
    assert "zero3" in capsys.readouterr().out
    assert main([*command, "zero33"]) == 2
    assert "--accelerate_config zero33" in capsys.readouterr().err
