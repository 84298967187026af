"""Given an output (n,) and y (n, 1), torch broadcasts to (n, n) and only warns. The check detects this only for "mse",
and om.preflight silences the warning: `check` passes, and the run learns the wrong loss.
Expected: an element-wise loss is reported as a problem (or at least a note) if the shapes of output and y differ."""
import sys, tempfile, types, warnings, torch
from torch import nn
from torch.nn import functional as F
import online_meta as om
from deploy.config.config import make_config
from deploy.checks.preflight import check_learning
from deploy.exits import CommandError
warnings.simplefilter("ignore")
mod = types.ModuleType("squeezing"); sys.modules["squeezing"] = mod
class Squeezed(nn.Sequential):
    def forward(self, x): return super().forward(x)[:, 0]
mod.squeezed = lambda: Squeezed(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
passed = []
for loss in ("mse", "torch.nn.functional:smooth_l1_loss", "torch.nn.functional:l1_loss", "torch.nn.functional:huber_loss"):
    raw = {"run": {"path": tempfile.mkdtemp()}, "task": {"x_shape": [4], "y": "real", "y_shape": [1]},
           "model": {"build": "squeezing:squeezed", "loss": loss}, "inner": {"steps": 1}, "regret": {"comparator": [], "baselines": []}}
    try: check_learning(make_config(raw, "x")); passed.append(loss)
    except CommandError as stop: print(loss, "refused:", str(stop)[:120])
torch.manual_seed(0); m = mod.squeezed(); x, y = torch.randn(8, 4), torch.randn(8, 1)
wrong, right = float(F.huber_loss(m(x), y)), float(F.huber_loss(m(x)[:, None], y))
inner = om.Inner(om.model_loss(m, "mse"), om.rules.sgd(lr=.01), 1)
report = om.preflight(inner, inner.init(dict(m.named_parameters())), [om.Task(om.Batch(x, y), om.Batch(x, y))])
print(f"huber: {wrong:.4f} instead of the true loss {right:.4f}; check passes {passed}; om.preflight with 'mse' reports {report}")
sys.exit(f"FAULT: silently uses the loss of all pairs: check passes {passed}; om.preflight reports {report.problems}" if passed or not report.problems else 0)
