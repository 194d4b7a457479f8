"""A step: the same gradients by any number of processes, at once or in parts; in fp64, where no mistake is rounding."""

import pytest
import torch
from conftest import run_stage_cli, succeed, without_gpus
from toy_steps import ACCUMULATED, CACHED, CASES, PLAIN, Case, Step, write_tokens

from nanocolbert.training.step import cat_widened, losses_of


@pytest.fixture(scope="module")
def tokens(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "tokens"
    write_tokens(tokens_dir, folder)
    return folder


@pytest.fixture(scope="module")
def found(model_dir, tokens) -> dict:
    """{processes: {case: (losses, gradients)}}."""
    succeed(run_stage_cli("tests/toy_steps.py", model_dir, tokens, env=without_gpus()))
    return {n: torch.load(tokens / f"found-{n}") for n in CASES}


def check_same(found, expected) -> None:
    """Losses and gradients, to the rounding of fp64."""
    (losses, gradient), (expected_losses, expected_gradient) = found, expected
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert (gradient - expected_gradient).abs().max() < 1e-9 * expected_gradient.abs().max()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_processes_and_parts(found, n):
    """One process with the whole batch at once is what all come to, the temperature's gradient (the last) included."""
    for plain, cached in zip(PLAIN, CACHED, strict=True):
        expected = found[1][plain]
        assert expected[1].abs().max() > 1e-3 and expected[1][-1] != 0
        for case in (plain, cached):
            check_same(found[n][case], expected)
    for case in set(ACCUMULATED) & set(CASES[n]):
        check_same(found[n][case], found[1][ACCUMULATED[0]])


def test_losses_differ(found):
    """What is compared above can be told apart: gradients of another loss, or over other micro-batches, are others."""
    gradients = [found[1][case][1] for case in (*PLAIN, ACCUMULATED[0])]
    for i, one in enumerate(gradients):
        assert all((one - other).abs().max() > 1e-3 for other in gradients[:i])


def test_dropout_is_drawn_once(model_dir, tokens):
    """A part that is embedded twice drops the same: gradients are those of the parts' graphs, all kept."""
    step = Step(Case(("in_batch",), cached_parts=2, dropout=0.3), model_dir, tokens)
    (batch,) = step.batches
    torch.manual_seed(7)
    kept = zip(*(step.model(**inputs) for inputs in batch["parts"]), strict=True)
    loss = losses_of(step.accelerator, step.objective, *map(cat_widened, kept), batch)["loss"]
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, step.weights)])
    after = torch.get_rng_state()
    torch.manual_seed(7)
    said, gradient = step.run()
    assert said["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert (gradient - expected).abs().max() < 1e-9 * expected.abs().max()
    assert torch.equal(torch.get_rng_state(), after)  # the next step draws others
