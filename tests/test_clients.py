"""Real clients, unchanged but for the line that makes the optimizer."""

import contextlib
import os
import random
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import tl1kernels as tk
from tests.common import network, same, state_of

pytestmark = [
    pytest.mark.usefixtures("each_backend", "nothing_left_behind"),
    # The clients' own warnings are theirs. The last filter that fits decides.
    pytest.mark.filterwarnings(
        "ignore",
        "error:tl1kernels",  # what our backends say
        "error:::tl1kernels",  # what our code makes others say
        "error:Detected call of",  # a scheduler that does not see the optimizer's steps
    ),
]

CUT = {"a": 0.1, "lam": 1.0}  # a few of `network`'s weights die at each step of lr 0.01
EPOCHS, BATCHES = 3, 4


@pytest.fixture
def nothing_left_behind(monkeypatch):
    """Clients seed generators, set variables and keep singletons; the next test sees none of it."""
    with contextlib.suppress(ImportError):  # its watching thread never ends
        monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    numbers = random.getstate()
    arrays = np.random.get_state()  # noqa: NPY002 (the one that clients seed)
    threads = set(threading.enumerate())
    with mock.patch.dict(os.environ):
        yield
    forget_accelerate()
    random.setstate(numbers)
    np.random.set_state(arrays)  # noqa: NPY002
    assert set(threading.enumerate()) <= threads


def forget_accelerate():
    """Let the next run start as in a process of its own."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def ours(model, **options):
    return tk.ProxAdamW(tk.param_groups(model, **options), lr=0.01, weight_decay=0.1)


def ours_bare(model, **options):
    return tk.ProxAdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)


def torchs(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def loader(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5 * BATCHES, 6, generator=generator, dtype=dtype)
    y = torch.randn(5 * BATCHES, 3, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, y), batch_size=5)


def loss_of(model, x, y):
    return torch.nn.functional.mse_loss(model(x), y)


def assert_is_torchs(model, theirs, backend):
    """Assert equal weights: the reference's to the last bit, kernels' to 1e-12."""
    tolerance = 0 if backend == "reference" else 1e-12
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def assert_resumed(model, optimizer, to_be):
    """Assert equal weights, state and options, lam among them, to the bit."""
    weights, state = to_be
    assert same(dict(model.state_dict()), weights)
    assert same(state_of(optimizer), state)


def assert_some_died(model):
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.all(), name
    zeros = [int((p == 0).sum()) for p in model.parameters()]
    assert 0 < sum(zeros) < sum(p.numel() for p in model.parameters() if p.ndim > 1)


# --- PyTorch Lightning: Trainer, with a scheduler and gradient clipping.


def fit_with_lightning(folder, make, *, dtype=torch.float32, seed=0, epochs=EPOCHS, **resume):
    lightning = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network(dtype, seed)

        def training_step(self, batch, _):
            return loss_of(self.net, *batch)

        def configure_optimizers(self):
            optimizer = make(self.net)
            return [optimizer], [ExponentialLR(optimizer, 0.9)]

    module = Regression()
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        gradient_clip_val=0.1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1),
    )
    trainer.fit(module, loader(dtype), **resume)
    assert trainer.global_step == epochs * BATCHES
    return module.net, trainer.optimizers[0]


def test_lightning_resumes_to_the_bit_and_leaves_zeros(tmp_path):
    net, optimizer = fit_with_lightning(tmp_path, lambda net: ours(net, **CUT))
    assert_some_died(net)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**EPOCHS)
    to_be = net.state_dict(), state_of(optimizer)
    net, optimizer = fit_with_lightning(
        tmp_path / "resumed",
        lambda net: ours(net, lam=7.0, a=2.0),  # the checkpoint's say, not these
        seed=1,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    assert_resumed(net, optimizer, to_be)
    assert [group["lam"] for group in optimizer.param_groups] == [1.0, 1.0, 0.0]


def test_lightning_without_lam_is_torch(tmp_path, each_backend):
    mine, theirs = (
        fit_with_lightning(tmp_path / make.__name__, make, dtype=torch.float64)[0]
        for make in (lambda net: ours(net, lam=0.0), torchs)
    )
    assert_is_torchs(mine, theirs, each_backend)


def test_lightning_goes_on_with_ours_where_torch_stopped(tmp_path):
    """What torch's checkpoint does not say, lam, is as it was made."""
    net, _ = fit_with_lightning(tmp_path, torchs, epochs=1)
    assert all(p.all() for p in net.parameters())
    net, optimizer = fit_with_lightning(
        tmp_path, lambda net: ours_bare(net, **CUT), ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert_some_died(net)
    assert optimizer.param_groups[0]["lam"] == 1.0
    assert all(state["step"] == EPOCHS * BATCHES for state in optimizer.state.values())


# --- Hugging Face Accelerate: prepare, accumulate, clip, save_state and load_state.


def train_with_accelerate(make, *, dtype=torch.float32, seed=0, load=None, save=None):
    accelerate = pytest.importorskip("accelerate")
    forget_accelerate()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = network(dtype, seed)
    optimizer = make(net)
    scheduler = ExponentialLR(optimizer, 0.9)
    prepared = accelerator.prepare(net, optimizer, loader(dtype), scheduler)
    model, accelerated, batches, scheduler = prepared
    if load:
        accelerator.load_state(load)
    for epoch in range(1 if load else 0, EPOCHS):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                accelerated.step()
                scheduler.step()
                accelerated.zero_grad()
        if save and epoch == 0:
            accelerator.save_state(save)
    assert all(state["step"] == EPOCHS * BATCHES / 2 for state in optimizer.state.values())
    return net, optimizer


def test_accelerate_resumes_to_the_bit_and_leaves_zeros(tmp_path):
    net, optimizer = train_with_accelerate(lambda net: ours(net, **CUT), save=tmp_path)
    assert_some_died(net)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9 ** (EPOCHS * BATCHES / 2))
    to_be = net.state_dict(), state_of(optimizer)
    net, optimizer = train_with_accelerate(
        lambda net: ours(net, lam=7.0, a=2.0), seed=1, load=tmp_path
    )
    assert_resumed(net, optimizer, to_be)


def test_accelerate_without_lam_is_torch(each_backend):
    mine, theirs = (
        train_with_accelerate(make, dtype=torch.float64)[0]
        for make in (lambda net: ours(net, lam=0.0), torchs)
    )
    assert_is_torchs(mine, theirs, each_backend)


# --- Hugging Face Transformers: Trainer, on a BERT of one layer, with dropout and shuffling.


def train_with_transformers(folder, make, *, dtype=torch.float32, seed=0, steps=4, resume=None):
    pytest.importorskip("accelerate")  # its Trainer needs it
    transformers = pytest.importorskip("transformers")
    forget_accelerate()
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(config).to(dtype)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (16, 8), generator=generator)
    settings = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=2,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=[{"input_ids": row, "labels": int(row[0] > 15)} for row in tokens],
        optimizers=(optimizer, ExponentialLR(optimizer, 0.9)),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    assert all(state["step"] == steps for state in optimizer.state.values())
    return model, optimizer


def test_transformers_resumes_to_the_bit_and_leaves_zeros(tmp_path):
    options = {"lam": 0.1, "a": 0.1}  # BERT starts smaller than `network`
    model, optimizer = train_with_transformers(tmp_path, lambda model: ours(model, **options))
    weights = [group["params"][0] for group in optimizer.param_groups if group["lam"]]
    assert len(weights) == 8  # query, key, value, output; two of the MLP; pooler; classifier
    assert all(0 < (p == 0).sum() < p.numel() for p in weights)
    embeddings = model.bert.embeddings.position_embeddings.weight
    assert embeddings.all()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**4)
    to_be = model.state_dict(), state_of(optimizer)
    model, optimizer = train_with_transformers(
        tmp_path / "resumed",
        lambda model: ours(model, lam=7.0, a=2.0),
        seed=1,
        resume=str(tmp_path / "checkpoint-2"),
    )
    assert_resumed(model, optimizer, to_be)


def test_transformers_without_lam_is_torch(tmp_path, each_backend):
    mine, theirs = (
        train_with_transformers(tmp_path, make, dtype=torch.float64)[0]
        for make in (lambda model: ours(model, lam=0.0), torchs)
    )
    assert_is_torchs(mine, theirs, each_backend)


# --- TensorBoard: what a run logs, as it is.


def test_tensorboard_reads_back_lam_sparsity_and_the_penalty(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = network()
    optimizer = ours(net, lam=0.0, a=0.1)
    layer = optimizer.param_groups[0]
    want = []
    with SummaryWriter(str(tmp_path)) as writer:
        for i, (x, y) in enumerate(loader(torch.float32)):
            layer["lam"] = 1.5 * i  # a warm-up
            optimizer.zero_grad()
            loss_of(net, x, y).backward()
            optimizer.step()
            left = tk.sparsity(net, example_inputs=x)
            writer.add_scalar("lam", optimizer.param_groups[0]["lam"], i)
            writer.add_scalar("parameters", left.parameters_fraction, i)
            writer.add_scalar("flops", left.flops_fraction, i)
            writer.add_scalar("penalty", tk.penalty_value(net[0].weight, lam=1.5 * i, a=0.1), i)
            for name, value in left.as_dict().items():
                if name != "layers":
                    writer.add_scalar(f"all/{name}", value, i)
            sizes = net[0].weight.detach().double().abs()
            want.append(
                {
                    "lam": 1.5 * i,
                    "parameters": np.mean([bool(v) for p in net.parameters() for v in p.flatten()]),
                    "flops": np.mean([bool(v) for k in (0, 2) for v in net[k].weight.flatten()]),
                    "penalty": 1.5 * i * (1.1 * sizes / (0.1 + sizes)).sum().item(),
                    "all/parameters_left": sum(int((p != 0).sum()) for p in net.parameters()),
                }
            )
    read = EventAccumulator(str(tmp_path)).Reload()
    for tag in want[0]:
        events = read.Scalars(tag)
        assert [event.step for event in events] == list(range(BATCHES))
        values = [event.value for event in events]
        np.testing.assert_allclose(values, [row[tag] for row in want], rtol=1e-6)
    fractions = [row["parameters"] for row in want]
    assert fractions[0] == 1.0
    assert fractions[-1] < fractions[1] <= 1.0
    assert read.Scalars("all/flops")[0].value == 2 * (6 * 8 + 8 * 3)
