"""POST /v1/adapt gets a body that is valid on the wire but that the model cannot process (a token outside the vocabulary,
one support sample under batch normalisation). The response is 500, with a traceback in the log, although the client is
at fault. Expected: 422 with a reason, as `online-meta adapt --checkpoint` already gives. Runs the daemon's own
application with a published leader."""
import sys, tempfile, pathlib, types, torch
from types import SimpleNamespace
from torch import nn
from safetensors.torch import save, save_file
from starlette.testclient import TestClient
from deploy.leader import Adapter
from deploy.server.app import create_app
from deploy.config.config import make_config
class Mean(nn.Module):
    def forward(self, x): return x.mean(1)
mod = types.ModuleType("adapting"); sys.modules["adapting"] = mod
mod.words = lambda: nn.Sequential(nn.Embedding(50, 8), Mean(), nn.Linear(8, 3))
mod.bn = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
found = {}
for name, task, build, bad in (
        ("token outside the vocabulary", {"x_shape": [6], "x_dtype": "int64"}, "words", lambda: (torch.full((3, 6), 50), 3)),
        ("one sample under BatchNorm", {"x_shape": [4]}, "bn", lambda: (torch.randn(1, 4), 1))):
    folder = pathlib.Path(tempfile.mkdtemp())
    config = make_config({"run": {"path": str(folder)}, "task": {**task, "y": "class", "ways": 3}, "model": {"build": f"adapting:{build}"}}, "x")
    weights = {n: p.detach().contiguous() for n, p in getattr(mod, build)().named_parameters()}
    save_file(weights, folder / "leader.safetensors", {"round": "0"})
    app = create_app(SimpleNamespace(config=config, adapter=Adapter(config.trainer(), folder / "leader.safetensors"), token=None))
    x, n = bad()
    answer = TestClient(app, raise_server_exceptions=False).post("/v1/adapt", headers={"Content-Type": "application/octet-stream"}, content=save({"support_x": x, "support_y": torch.arange(n) % 3, "query_x": x.clone()}))
    found[name] = answer.status_code; print(name, answer.status_code, answer.text[:150])
bad = [name for name, code in found.items() if code >= 500]
sys.exit(f"FAULT: status 500 for a client error: {bad}" if bad else 0)
