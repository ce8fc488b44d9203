"""`python -m benchmarks.longest`: what wrong input gets."""

import pytest

from benchmarks.longest import longest
from experiments.cli import main


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--model=Qwen3-9B", "model is 'Qwen3-9B'; valid: Qwen3-0.6B, Qwen3-4B, Qwen3-8B"),
        ("--target=h10", "target 'h10' is not known (did you mean 'h100'?)"),
    ],
)
def test_a_wrong_name_is_one_line(flag, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(longest, [flag], package="benchmarks")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and text in error and error.count("\n") == 1
