"""The DeepSpeed engine: ZeRO shards meta-parameters and optimizer state over the ranks of a process group."""

import importlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from online_meta.meta_optimizer import (
    SCALAR_STATE,
    STATE_PREFIX,
    average_and_clip,
    check_saved,
    copy_to_cpu,
    flatten_meta,
    make_optimizer,
    saved_state,
    set_lr,
    unflatten_meta,
)
from online_meta.types import Engine, Meta, MetaGrad, Params, StepReport, TensorFilter
from trainers.distributed.process_group import set_timeouts
from trainers.distributed.rank_stats import RankStats
from trainers.distributed.rendezvous import split_address
from trainers.settings import EngineSettings, TrainerSettings


def save_state(
    engine: Any, stage: int, parts: Params, shapes: Mapping[str, torch.Size], keep: TensorFilter | None
) -> Params:
    """Return the full optimizer state of each parameter; a collective.

    Args:
        engine: DeepSpeed's engine.
        stage: ZeRO stage, 0 to 3.
        parts: flat parameters by name.
        shapes: original shapes of the parameters.
        keep: selects the tensors to return on this rank by name; None for all.

    Returns:
        Tensors on the CPU, under the names of ``MetaOptimizer.save``.
    """
    states = get_torch_optimizer(engine, stage).state
    saved = {}
    for key in _keys(states, _stepped_tensors(engine, stage)):
        same = next(state[key] for state in states.values() if key in state)
        values = dict.fromkeys(parts, same) if key in SCALAR_STATE else _gather(states, stage, parts, key)
        for name in parts:
            value = values[name] if key in SCALAR_STATE else values[name].view(shapes[name])
            full = f"{STATE_PREFIX}{key}.{name}"
            if not keep or keep(full):
                saved[full] = copy_to_cpu(value)
    return saved


def _gather(states: Mapping[Any, Mapping[str, Any]], stage: int, parts: Params, key: str) -> Params:
    """Return one key of the optimizer state of each parameter, full and flat, on every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage == 0:
        return {name: states[part][key] for name, part in parts.items()}
    if stage == 3:
        return {name: safe_get_full_optimizer_state(part, key) for name, part in parts.items()}
    # One collective for all parameters: one per parameter would pause training for longer.
    sizes = [part.numel() for part in parts.values()]
    packed = next(iter(parts.values())).new_zeros(sum(sizes))
    state_views = dict(zip(parts, torch.split(packed, sizes), strict=True))
    for name, part in parts.items():
        mapping = part._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed: the fragment on this rank
        if mapping is not None:
            fragment = mapping.lp_fragment_address
            state_views[name].narrow(0, fragment.start, fragment.numel).copy_(mapping.get_optim_state_fragment(key))
    dist.all_reduce(packed)
    return state_views


def load_state(engine: Any, stage: int, parts: Params, saved: Params) -> None:
    """Replace the parameters and their optimizer state by saved ones; a collective.

    Args:
        engine: DeepSpeed's engine.
        stage: ZeRO stage, 0 to 3.
        parts: flat parameters by name.
        saved: tensors under the names of ``MetaOptimizer.save``.
    """
    optimizer, shards, saved_values = (
        get_torch_optimizer(engine, stage),
        _stepped_tensors(engine, stage),
        saved_state(saved),
    )
    optimizer.state.clear()
    if stage == 0:
        for (key, name), value in saved_values.items():
            value = value.detach().clone()
            optimizer.state[parts[name]][key] = (
                value if key in SCALAR_STATE else value.reshape(-1).to(parts[name].device)
            )
        return
    for key, value in {key: value for (key, _), value in saved_values.items()}.items():
        for shard in shards:
            optimizer.state[shard][key] = value.detach().clone() if key in SCALAR_STATE else torch.zeros_like(shard)
    if stage < 3:  # DeepSpeed links the fragments of the state to the parameters only once.
        engine.optimizer._hp_optimizer_states_linked = False
        if saved_values:
            engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, part in parts.items():
        _set_value(part, stage, saved[name])
    for (key, name), value in saved_values.items():
        if key not in SCALAR_STATE:
            _set_value(parts[name], stage, value, key)


def _set_value(part: Tensor, stage: int, value: Tensor, key: str | None = None) -> None:
    """Set a sharded parameter, or one ``key`` of its optimizer state, from the full ``value``, at stages 1 to 3."""
    from deepspeed import utils

    if stage == 3:
        own = _own_shard(part, value)
        if key is None:
            utils.safe_set_local_fp32_param(part, own)
        else:
            utils.safe_set_local_optimizer_state(part, own, key)
    elif key is None:
        utils.safe_set_full_fp32_param(part, value.reshape(-1).to(part.device))
    else:
        utils.safe_set_full_optimizer_state(part, value.reshape(-1).to(part.device), key)


def _own_shard(part: Tensor, value: Tensor) -> Tensor:
    """Return this rank's shard of a full value, padded with zeros: DeepSpeed cuts values only if all shards are full.

    Args:
        part: sharded parameter, at stage 3.
        value: of the whole parameter, of any shape.
    """
    size = part.ds_tensor.numel()  # type: ignore[attr-defined]  # set by DeepSpeed
    own = value.reshape(-1)[size * dist.get_rank() :][:size].to(part.device)
    return torch.cat([own, own.new_zeros(size - len(own))])


def get_torch_optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """Return the torch optimizer that DeepSpeed's optimizer wraps.

    Args:
        engine: DeepSpeed's engine.
        stage: ZeRO stage, 0 to 3.
    """
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return optimizer


def _stepped_tensors(engine: Any, stage: int) -> list[Tensor]:
    """Return the tensors that the torch optimizer steps on this rank: parameters, or flat shards of them."""
    if stage == 0:
        return [part for group in engine.optimizer.param_groups for part in group["params"]]
    optimizer = engine.optimizer
    return list(optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat)


def _keys(states: Mapping[Any, Mapping[str, Any]], shards: list[Tensor]) -> list[str]:
    found = {key for shard in shards for key, value in states.get(shard, {}).items() if isinstance(value, Tensor)}
    return sorted(found)


LARGEST_BUCKET = 500_000_000


INSTALL_HINT = "the engine 'deepspeed' needs a package that is not installed: pip install 'online-meta[deepspeed]'"


def check(settings: EngineSettings) -> None:
    """Check that this machine can run the engine, without importing DeepSpeed.

    Raises:
        ValueError: if a package or a GPU is missing, or settings contradict each other.
    """
    missing = [name for name in ("deepspeed", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{INSTALL_HINT} ({', '.join(missing)})")
    if settings.deterministic and settings.batching not in ("loop", "traced", "compiled"):
        raise ValueError(
            f"batching = {settings.batching!r} with deterministic = true: the order of the sum would depend on the "
            "number of ranks; set batching = 'traced' or 'compiled', which then compute one task at a time, or 'loop'"
        )
    _check_machines(settings)
    if settings.device.startswith("cuda") and settings.processes > torch.cuda.device_count():
        raise ValueError(f"processes = {settings.processes}, but this machine has {torch.cuda.device_count()} GPUs")


def _check_machines(settings: EngineSettings) -> None:
    """Raise ``ValueError`` if the settings of several machines contradict each other, or name no private network."""
    min_nodes, max_nodes = settings.nodes
    if min_nodes > max_nodes:
        raise ValueError(
            f"nodes = {[*settings.nodes]}: the first is the smallest, the second the largest number of machines"
        )
    if max_nodes == 1:
        return
    if not re.fullmatch(r".+:[1-9][0-9]{0,4}", settings.rendezvous):
        raise ValueError(
            f"rendezvous = {settings.rendezvous!r} and nodes = {[*settings.nodes]}: set rendezvous to 'host:port', "
            "an address of this machine that the others can reach"
        )
    if split_address(settings.rendezvous)[0] in ("0.0.0.0", "::", "*"):
        raise ValueError(
            f"rendezvous = {settings.rendezvous!r} is every address of this machine: name the one on the private "
            "network that joins the machines"
        )
    if not settings.trusted_network:
        raise ValueError(
            f"nodes = {[*settings.nodes]}: ranks on several machines neither authenticate nor encrypt anything, so "
            "whoever reaches their ports can run code on every machine of the run. If only these machines can reach "
            f"{settings.rendezvous} and each other, set trusted_network = true"
        )


def build(settings: TrainerSettings, meta: Meta, rank_stats: RankStats | None = None) -> Engine:
    """Return an engine that steps meta-parameters on all ranks of the process group.

    Args:
        settings: of the run; ``settings.meta`` names the optimizer.
        meta: initial meta-parameters.
        rank_stats: counts the time that the engine waits for other ranks.

    Raises:
        ValueError: for an unknown optimizer.
    """
    return ShardedOptimizer(meta, settings, rank_stats or RankStats())


class ParameterModule(nn.Module):
    """A module whose parameters DeepSpeed shards and steps, with a loss that has a given gradient.

    The loss sum_i <p_i, g_i> has the gradient g_i. A backward pass through DeepSpeed's module, which is the one input
    that is correct at every ZeRO stage, thus accepts gradients that were computed elsewhere. Each parameter is flat,
    because DeepSpeed cannot broadcast a scalar, and float32, because it cannot reduce float64.

    Args:
        parameters: by name; they are copied.
    """

    def __init__(self, parameters: Params) -> None:
        """Copy the parameters to flat float32 tensors."""
        super().__init__()
        flat = [value.detach().reshape(-1).float().clone() for value in parameters.values()]
        self.parts = nn.ParameterList(map(nn.Parameter, flat))

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        """Return sum_i <p_i, g_i>, a scalar."""
        return torch.stack(
            [(part * grad.reshape(-1)).sum() for part, grad in zip(self.parts, grads, strict=True)]
        ).sum()


class ShardedOptimizer:
    """An engine that steps meta-parameters on many ranks; it implements ``Engine``.

    All ranks sum their gradients and weights, so that each has the same mean, clips it identically, and skips the same
    non-finite steps. DeepSpeed then steps its shards; from stage 1 on, it averages the equal gradients again. Every
    rank holds a full copy of the meta-parameters for adaptation. ZeRO shards the optimizer state (stage 1), the
    gradients (2) and DeepSpeed's own copy of the parameters (3).

    Args:
        meta: initial meta-parameters.
        settings: of the run.
        rank_stats: counts the time that the engine waits for other ranks.
    """

    def __init__(self, meta: Meta, settings: TrainerSettings, rank_stats: RankStats) -> None:
        """Shard the meta-parameters over the ranks of the process group; a collective."""
        self._rank_stats, self._on_gpu = rank_stats, settings.engine.device.startswith("cuda")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._stage, self._clip_norm = settings.engine.zero_stage, settings.meta.clip_norm
        self._lr, self.lr_scale = settings.meta.lr, 1.0
        self._shapes = {name: value.shape for name, value in flatten_meta(meta).items()}
        parameter_module = ParameterModule(flatten_meta(meta))
        own = settings.meta
        optimizer = make_optimizer(own.optimizer, parameter_module.parameters(), own.lr, own.optimizer_options)
        self.gather = self._gather_shares if settings.engine.deterministic else None
        size = sum(part.numel() for part in parameter_module.parts)
        self._engine = _initialize(parameter_module, optimizer, _config(settings, size))
        if not self._stage:  # Every rank has the same mean gradient already, and steps all of the parameters.
            self._engine.enable_backward_allreduce = False
        set_timeouts(settings.engine.timeout_seconds)
        self._parts = dict(zip(self._shapes, parameter_module.parts, strict=True))
        self._meta = self._gather_meta()

    def meta(self) -> Meta:
        """Return the current meta-parameters, complete on every rank; do not write to them."""
        return self._meta

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Make one step with the weighted mean over all ranks; every rank returns the same report.

        Args:
            sums: weighted sum of the loss and the gradients on this rank.
            weight: sum of the weights on this rank.
        """
        if self.gather is None:
            sums, weight = self._sum_over_ranks(sums, weight)
        summed = flatten_meta(sums.grads)
        grads, report = average_and_clip([summed[name] for name in self._parts], sums.loss, weight, self._clip_norm)
        if report.skipped is None:
            # DeepSpeed's communication cannot be timed separately from its step: all of it counts as waiting.
            with self._measure_collective(), _silence_warnings():
                with self._gathered_parameters():
                    self._engine.backward(self._engine(grads=grads))
                set_lr(get_torch_optimizer(self._engine, self._stage), self._lr * self.lr_scale)
                self._engine.step()
            self._meta = self._gather_meta()
        return report

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state under the names of ``MetaOptimizer.save``; a collective.

        Args:
            keep: selects the tensors to return on this rank by name; None for all.
        """
        saved = {name: copy_to_cpu(value) for name, value in flatten_meta(self._meta).items() if not keep or keep(name)}
        with _silence_warnings():
            return saved | save_state(self._engine, self._stage, self._parts, self._shapes, keep)

    def load(self, saved: Params) -> None:
        """Load the state that an engine of any kind, ZeRO stage and number of ranks has saved; a collective.

        Raises:
            ValueError: if the names or shapes differ from those of these meta-parameters; nothing is changed then.
        """
        check_saved(saved, self._shapes)
        with _silence_warnings():
            with self._gathered_parameters(modifier_rank=0), torch.no_grad():
                for name, part in self._parts.items():
                    part.copy_(saved[name].reshape(-1))
            load_state(self._engine, self._stage, self._parts, saved)
        self._meta = self._gather_meta()

    def _sum_over_ranks(self, sums: MetaGrad, weight: float) -> tuple[MetaGrad, float]:
        """Return the sums over all ranks, the same on each."""
        if self.world == 1:
            return sums, weight
        total = self._pack(sums, weight)
        with self._measure_collective():
            dist.all_reduce(total)
        return self._unpack(total)

    def _gather_shares(self, share: MetaGrad, weight: float) -> list[tuple[MetaGrad, float]]:
        own_share = self._pack(share, weight)
        shares = [torch.empty_like(own_share) for _ in range(self.world)]
        with self._measure_collective():
            dist.all_gather(shares, own_share)
        return [self._unpack(one) for one in shares]

    @contextmanager
    def _measure_collective(self) -> Iterator[None]:
        """Count the duration of the block as waiting for other ranks, if there are any.

        Collectives block on a CPU, but a GPU only queues them. On a GPU the measurement therefore synchronises before
        and after the block, which costs little because the result is needed at once.
        """
        if self.world == 1:
            yield
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        with self._rank_stats.measure_waiting():
            yield
            if self._on_gpu:
                torch.cuda.synchronize()

    def _pack(self, sums: MetaGrad, weight: float) -> Tensor:
        """Return gradients, weight and loss as one flat tensor."""
        grads = flatten_meta(sums.grads)
        flat = [grads[name].detach().reshape(-1).float() for name in self._shapes]
        return torch.cat([*flat, flat[0].new_tensor([weight]), sums.loss.detach().reshape(1).float()])

    def _unpack(self, packed: Tensor) -> tuple[MetaGrad, float]:
        *flat, weight, loss = torch.split(packed, [*(shape.numel() for shape in self._shapes.values()), 1, 1])
        found = {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, flat, strict=True)}
        return MetaGrad(loss[0], unflatten_meta(found)), float(weight)

    def _gather_meta(self) -> Meta:
        """Return full, detached copies of the current parameters."""
        with _silence_warnings(), self._gathered_parameters():
            return unflatten_meta({n: part.detach().clone().view(self._shapes[n]) for n, part in self._parts.items()})

    def _gathered_parameters(self, modifier_rank: int | None = None) -> Any:
        """Return a context in which the parameters are complete; at stage 3 they are sharded outside of it."""
        return _import_deepspeed().zero.GatheredParameters(
            list(self._parts.values()), modifier_rank=modifier_rank, enabled=self._stage == 3
        )


def _initialize(parameter_module: ParameterModule, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine for ``parameter_module``, without compiling anything."""
    with _silence_warnings():
        deepspeed = _import_deepspeed()
        log = logging.getLogger("DeepSpeed")
        log.setLevel(logging.ERROR)  # It warns about optimizers that this project tests.
        log.handlers.clear()  # It would write lines in its own format to standard output.
        log.propagate = True
        # Disable DeepSpeed's operators: they would be compiled, and even the check for them runs a compiler.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        _import_muon()
        return deepspeed.initialize(
            model=parameter_module, optimizer=optimizer, config=config, dist_init_required=False
        )[0]


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer with ``torch.compile`` disabled: the compilation takes 2 s, used or not."""
    compile, torch.compile = torch.compile, lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compile


@contextmanager
def _silence_warnings() -> Iterator[None]:
    """Silence warnings that DeepSpeed and torch raise about their own code, which users cannot fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import_deepspeed() -> Any:
    import deepspeed  # The import takes seconds, and the other engines do not need it.

    return deepspeed


def _config(settings: TrainerSettings, size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, which uses ZeRO only; this engine averages, clips and checks for finiteness.

    DeepSpeed allocates its buckets, by default of 2 GB each, in every step. They are limited to ``size`` parameters.
    """
    bucket = min(size + size % 2, LARGEST_BUCKET)  # DeepSpeed requires an even number.
    zero: dict[str, Any] = {
        "stage": settings.engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "memory_efficient_linear": False,  # Stage 3 would replace torch's linear layer for the whole process.
    }
    if settings.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's optimizers: DeepSpeed's own would be compiled
        "zero_force_ds_cpu_optimizer": False,
    }
