"""`headgate train`: one loss under every fold, from one process to four and back; what does not fit is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")

from headgate import cli
from headgate.cli.train import Options
from headgate.cli.train.options import choose, misfit, parse_fold

SIZES = {"layers": 2, "hidden": 16, "ffn": 8, "experts": 8, "top-k": 2, "heads": 4, "length": 16, "batch": 8, "seed": 3}
# Adam divides by the gradient's size, so that the rounding of small gradients shows.
CLOSE = 1e-4


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.py"
    path.write_bytes(b"def add(a, b):\n    return a + b\n\n\n" * 400)
    return path


def arguments(text: Path, **more) -> list[str]:
    given = SIZES | {"text": text, "timeout": 60} | {name.replace("_", "-"): value for name, value in more.items()}
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def alone(capsys, *args, **more) -> dict:
    """The figures of a training in this process."""
    assert cli.main([*arguments(*args, **more), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def ranks(count: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """The same command by torchrun, through the console script."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--no-python"]
    start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a free port
    command = [*start, str(Path(sys.executable).with_name("headgate")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def many(count: int, folder: Path, *args, **more) -> dict:
    done = ranks(count, [*arguments(*args, **more), "--json"], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_one_loss_under_every_fold_and_across_a_checkpoint(text, tmp_path, capsys):
    """Two steps under one fold, two more from its checkpoint under another, one more in one process."""
    one = [alone(capsys, text, steps=n, checkpoint=tmp_path / "one") for n in (2, 4, 5)]
    moved = [
        many(4, tmp_path, text, steps=2, checkpoint=tmp_path / "many", fold="tp=2,cp=2,ep=2,etp=2"),
        many(4, tmp_path, text, steps=4, checkpoint=tmp_path / "many", fold="pp=2,dp=2,ep=2", micro=1),
        alone(capsys, text, steps=5, checkpoint=tmp_path / "many"),
    ]
    for expected, found in zip(one, moved, strict=True):
        assert found["last_step"] == expected["last_step"]
        for figure in ("loss", "grad_norm"):
            assert found[figure] == pytest.approx(expected[figure], rel=CLOSE), figure
    assert [len(found["loss"]) for found in one] == [2, 2, 1]
    assert one[0]["loss"][0] > one[2]["loss"][0]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_train_as_one_process_does(text, tmp_path, capsys):
    expected = alone(capsys, text, steps=2)
    found = many(2, tmp_path, text, steps=2, fold="tp=2,ep=2")
    assert (found["ranks"], found["last_step"]) == (2, 2)
    for figure in ("loss", "grad_norm"):
        assert found[figure] == pytest.approx(expected[figure], rel=CLOSE), figure


@pytest.mark.slow
def test_ranks_are_refused_together(text, tmp_path):
    done = ranks(2, arguments(text, fold="dp=2,ep=4"), tmp_path)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("headgate: ") == 1
    assert "headgate: Fold: dp * cp * tp must equal edp * ep * etp, got dp=2" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fold": "dp=2"}, "Fold: dp * cp * tp must equal edp * ep * etp"),
        ({"fold": "tp=2,ep=2"}, "Fold: pp * dp * cp * tp must be the world's 1 ranks, got dp=1 cp=1 tp=2"),
        ({"fold": "dp:2"}, "train: --fold must be sizes such as dp=2,tp=2,ep=4, each of dp, cp, tp, edp, ep, etp, pp"),
        ({"fold": "dp=1,dp=1"}, "train: --fold must be sizes such as"),
        ({"batch": 6, "micro": 4}, "train: --batch must be a multiple of 4 (dp and 4 micro-batches), got 6 under dp=1"),
        ({"length": 1000}, "train: the text must have at least 40,000 bytes, got 13,600 in "),
        ({"text": "/nowhere"}, "train: --text must be a file that can be read, got /nowhere"),
        ({"steps": 0}, "train: --steps must be at least 1, got 0"),
        ({"every": 5}, "train: --every must come with --checkpoint, got 5 without it"),
        ({"hidden": 20}, "train: --hidden must be a multiple of twice --heads (4), got 20"),
        ({"top_k": 9}, "train: --top-k must be at most --experts (8), got 9"),
        ({"wire": "int4"}, "train: --wire must be one of exact, bf16, fp8, int8, got 'int4'"),
        ({"dispatcher": "magic"}, "parallelize: dispatcher must be one of"),
        ({"dispatcher": "deep_ep"}, "train: --dispatcher must be one that moves fp32 rows, got 'deep_ep'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_line(more, said, text, capsys):
    assert cli.main(arguments(**({"text": text} | more))) == 2
    heard = capsys.readouterr()
    assert heard.err.startswith(f"headgate: {said}")
    assert heard.err.count("\n") == 1
    assert not dist.is_initialized()


def test_a_checkpoint_of_another_training_is_refused(text, tmp_path, capsys):
    alone(capsys, text, steps=1, checkpoint=tmp_path / "run")
    assert cli.main(arguments(text, steps=2, checkpoint=tmp_path / "run", batch=4)) == 2
    assert "must be of the same training, got one with batch 8 instead of 4" in capsys.readouterr().err
    assert alone(capsys, text, steps=1, checkpoint=tmp_path / "run")["loss"] == []  # nothing is left to do


def options(**more) -> Options:
    return Options(batch=16, **more)


def test_by_default_experts_are_spread_as_far_as_they_can_be():
    assert str(choose(options(), 4)[0]) == "dp=4 cp=1 tp=1 edp=1 ep=4 etp=1"
    shape = Options().shape
    assert str(choose(options(shape=type(shape)(experts=6)), 4)[0]) == "dp=4 cp=1 tp=1 edp=2 ep=2 etp=1"


def test_heads_that_do_not_divide_are_named():
    fold = parse_fold("tp=4, ep=4")
    with pytest.raises(ValueError, match=r"train: --heads must be a multiple of 4 \(tp \* cp\), got 6 under dp=1"):
        choose(options(fold=fold), 4)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_elastic_takes_the_nearest_fold_that_fits(world):
    asked = options(fold=parse_fold("dp=4,tp=2,ep=8"), elastic=True)
    sizes, said = choose(asked, world)
    assert sizes.stage * sizes.pp == world
    assert misfit(sizes, asked) is None
    if world == 8:
        assert (str(sizes), said) == ("dp=4 cp=1 tp=2 edp=1 ep=8 etp=1", None)
    else:
        assert said == f"--fold dp=4 cp=1 tp=2 edp=1 ep=8 etp=1 is for 8 ranks and here are {world}: taking {sizes}"


def test_elastic_still_refuses_what_never_fits():
    with pytest.raises(ValueError, match=r"Fold: dp \* cp \* tp must equal edp \* ep \* etp"):
        choose(options(fold=parse_fold("dp=4,ep=2"), elastic=True), 4)
    with pytest.raises(ValueError, match="train: --elastic found no fold of 7 ranks for this model and --batch 16"):
        choose(options(fold=parse_fold("dp=4,ep=4"), elastic=True), 7)
