"""A task matches [task], but the model cannot process it (a token outside the vocabulary, one sample under batch
normalisation, an image smaller than the kernel). It is acknowledged with a round. Then it ends the trainer after every
restart, so no later task is ever learned. Expected: it is refused, or skipped with a reason, and training continues.
Runs what the trainer process runs (open_run + play_rounds) on a history of good, bad, good tasks."""
import sys, tempfile, pathlib, types
from threading import Event
import torch
from torch import nn
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.types import Record
from streams.history.history import History
from streams.spec import Limits, TaskSpec
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run
from trainers.journal.run_files import RunFiles
from trainers.settings import *

class Mean(nn.Module):
    def forward(self, x): return x.mean(1)
models = types.ModuleType("poisoned_models"); sys.modules["poisoned_models"] = models
models.words = lambda: nn.Sequential(nn.Embedding(50, 8), Mean(), nn.Linear(8, 3))
models.bn = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
models.conv = lambda: nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
g = torch.Generator().manual_seed(0)
def words(bad):
    q = torch.randint(0, 50, (6, 6), generator=g)
    if bad: q[0, 0] = 50
    return torch.randint(0, 50, (6, 6), generator=g), q
def bn(bad): return torch.randn(1 if bad else 6, 4, generator=g), torch.randn(6, 4, generator=g)
def conv(bad):
    s = (1, 3, 3) if bad else (1, 12, 12)
    return torch.randn(6, *s, generator=g), torch.randn(6, *s, generator=g)
SPECS = {"words": TaskSpec((6,), "int64", "class", 3), "bn": TaskSpec((4,), ways=3), "conv": TaskSpec((1, -1, -1), ways=3)}
faults = []
for name, make in (("words", words), ("bn", bn), ("conv", conv)):
    folder = pathlib.Path(tempfile.mkdtemp())
    bodies = []
    for i in range(4):
        s, q = make(bad=i == 1)
        body = wire.encode(Task(Batch(s, torch.arange(len(s)) % 3), Batch(q, torch.arange(len(q)) % 3)))
        wire.decode(body, SPECS[name], Limits())  # the wire format accepts it, so the response is 201
        bodies.append(body)
    history = History.open(folder / "history", write=True)
    history.append([Record(f"t{i}", b, wire.digest(b), "s", None, 1.0) for i, b in enumerate(bodies)])
    settings = TrainerSettings(ModelSettings(f"poisoned_models:{name}"), InnerSettings(steps=1),
        regret=RegretSettings(comparator=(), baselines=()))
    reached = []
    for start in (1, 2):  # the daemon restarts the trainer from its last checkpoint
        run = open_run(settings, RunFiles(folder), history)
        try:
            reached.append(play_rounds(run, Event(), 4))
        except Exception as error:
            reached.append(f"round {run.round}: {type(error).__name__}: {error}")
        close_run(run)
    print(f"{name}: {reached}")
    if reached[-1] != 4: faults.append(name)
sys.exit(f"FAULT: one task stops the run permanently: {faults}" if faults else 0)
