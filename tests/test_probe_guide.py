"""The probe guide is true: its programs run and print what it shows, its tables are the code's."""

import ast
import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avex_export.cli import main as avex_export
from avex_export.recipes import find_recipe, variants
from avex_serve import build_model_from_spec, get_model_spec, load_model
from avex_serve.cli import main as avex_serve_cli
from avex_serve.configs import ProbeConfig
from avex_serve.models.aggregation import aggregate
from avex_serve.models.layers import frozen
from avex_serve.models.probes import build_probe_from_config, get_probe_class, list_probe_classes, load_probe_config
from avex_serve.models.probes.utils import registry
from tests.hub import hub_cache, use_cache

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / f"probe-{part}.md" for part in ("guide", "choosing", "training", "saving", "reference")]
GUIDE = "\n".join(page.read_text() for page in PAGES)
YAML = DOCS / "probe-yaml.md"
FULL_SIZE = "esp_aves2_naturelm_audio_v1_beats"
REPOSITORY = "EarthSpeciesProject/esp-aves2-naturelm-audio-v1-beats"
NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Section:
    title: str
    text: str

    @property
    def blocks(self):
        """(language, content) in order."""
        return re.findall(r"^```(\w+)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)


def sections(text):
    return [Section(*each) for each in re.findall(r"^## (.+?)$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)]


SECTIONS = sections(GUIDE)
TWINS = {section.title: section.blocks for section in sections(YAML.read_text())}


def parameter(section):
    return pytest.param(section, id=section.title, marks=[pytest.mark.slow] if FULL_SIZE in section.text else [])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with the full-size model's checkpoint, of random weights."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = build_model_from_spec(get_model_spec(FULL_SIZE), "cpu", return_features_only=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hub_cache(home, REPOSITORY, f"{REPOSITORY.split('/')[1]}.safetensors", lambda path: save_file(weights, path))
    return home


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_PROBE_CLASSES", dict(registry._PROBE_CLASSES))
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("section", [parameter(section) for section in SECTIONS])
def test_the_section_runs(section, workplace, monkeypatch, request):
    if f'load_model("{FULL_SIZE}"' in section.text:
        use_cache(monkeypatch, request.getfixturevalue("hub"))
    names, printed, configs = {"__name__": "guide"}, "", []
    for language, content in section.blocks:
        if language == "text":
            assert_same_text(printed, content)
            printed = ""
            continue
        assert printed == "", "a block prints what the guide doesn't show"
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(content, section.title, "exec"), names)
            printed = "" if "avex_export([" in content else out.getvalue()  # which tells with times what it does
            configs.append(names.get("config"))
        elif language == "yaml":
            assert same(read_yaml(content), names["config"])
        else:
            assert language == "sh"
            for line in content.splitlines():
                check_command(line)
    assert printed == ""
    assert names.get("status", 0) == 0
    left = iter(configs)  # the files are in the order of the programs
    for language, content in TWINS.get(section.title, ()):
        assert language == "yaml"
        loaded = read_yaml(content)
        assert any(same(loaded, config) for config in left), content


def read_yaml(content):
    path = Path(re.match(r"# (\S+\.yml)\n", content).group(1))
    path.write_text(content)
    return load_probe_config(path)


def same(loaded, config):
    """Whether a file says what a program's configuration says, set or unset."""
    return loaded == config and loaded.model_fields_set == config.model_fields_set


def test_every_file_belongs_to_a_section():
    assert list(TWINS) == [section.title for section in SECTIONS if section.title in TWINS]
    assert len(re.findall("^```yaml$", YAML.read_text(), re.MULTILINE)) == sum(map(len, TWINS.values()))


def check_command(line):
    program, *arguments = shlex.split(line)
    if program == "avex-export":
        assert avex_export(arguments) == 0
    elif program == "avex-serve":
        assert avex_serve_cli(arguments) == 0
    else:  # the line that the exporter prints; the tests of the service start servers
        setting, bundle = program.split("=")
        assert setting == "AVEX_BUNDLE"
        assert (Path(bundle) / "manifest.json").is_file()
        assert arguments == ["bentoml", "serve", "avex_serve.service:AvexService"]


def assert_same_text(printed, shown):
    """The same, but for decimals that training makes: they may differ by a tenth."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    found, expected = ([float(n) for n in NUMBER.findall(text)] for text in (printed, shown))
    assert found == pytest.approx(expected, abs=0.1)


def test_its_links_lead_somewhere():
    contents = re.findall(r"^- \[(.+?)\]", GUIDE, re.MULTILINE)
    assert contents == [section.title for section in SECTIONS]
    for page in (*PAGES, YAML):
        for link in re.findall(r"\]\((.+?)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = DOCS / name if name else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- the tables --------------------------------------------------------------------------------------------------


def table(first):
    """The cells of the table whose header begins so, without the quotes of code."""
    rows = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", GUIDE, re.MULTILINE).group(1).splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def bare(cell):
    return re.fullmatch("`(.*)`", cell).group(1)


def test_every_field_stands_in_the_table_with_its_default():
    schema = ProbeConfig.model_json_schema()
    fields = {bare(name): (kind, default) for name, kind, default, _, _ in table("field")}
    assert list(fields) == list(dict.fromkeys(fields))
    assert fields.keys() == schema["properties"].keys()
    for name, (kind, default) in fields.items():
        about = schema["properties"][name]
        assert kind == type_in_words(about), name
        if name in schema["required"]:
            assert default == "required"
        else:
            assert ast.literal_eval(bare(default)) == about["default"], name
            assert type(ast.literal_eval(bare(default))) is type(about["default"]), name


def type_in_words(about):
    if "enum" in about:
        return "one of " + ", ".join(f'`"{value}"`' for value in about["enum"])
    if "anyOf" in about:
        return " or ".join(type_in_words(choice) for choice in about["anyOf"])
    if about["type"] == "array":
        return f"list of {type_in_words(about['items'])}"
    names = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
    return {**names, "object": "dict"}[about["type"]]


def test_the_table_says_which_heads_use_a_field():
    classes = {kind: get_probe_class(kind) for kind in list_probe_classes()}
    of_heads = set().union(*(cls.options for cls in classes.values()))
    for name, _, _, heads, _ in table("field"):
        field = bare(name)
        users = {k for k, cls in classes.items() if field in cls.options.keys() - cls.without_effect}
        assert (set(heads.split(", ")) if field in of_heads else heads) == (users or "all"), field


@pytest.mark.parametrize("row", table("you write"), ids=lambda row: row[0])
def test_the_rule_holds(row):
    code, kind, message = row
    names = {
        "ProbeConfig": ProbeConfig,
        "layers": ["last_layer"],
        "base": load_model("avex_demo", return_features_only=True),
        "build": lambda config, **given: build_probe_from_config(config, num_classes=3, device="cpu", **given),
    }
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}.get(kind, Exception)) as raised:
        eval(bare(code), names)
    assert kind in {cls.__name__ for cls in type(raised.value).__mro__}
    assert message in re.sub(r"\s+", " ", str(raised.value))


def test_what_the_variants_cost():
    models = {
        "avex_demo": build_model_from_spec(get_model_spec("avex_demo"), "cpu", return_features_only=True),
        "EfficientNet-B0": build_model_from_spec(get_model_spec("esp_aves2_effnetb0_all"), "cpu"),
    }
    shapes = {name: layer_shapes(model) for name, model in models.items()}
    shapes["BEATs"] = [(496, 768)] * 13  # as the section on shapes finds, and as many layers as it has
    rows = {bare(name): [int(count) for count in counts] for name, *counts in table("variant")}
    assert sorted(rows) == list(variants())
    for name, counts in rows.items():
        config = find_recipe(name).config
        measured = [parameters(config, shapes[model]) for model in ("avex_demo", "BEATs", "EfficientNet-B0")]
        assert counts == measured, name


def layer_shapes(model):
    layers = model.get_model_layers()
    with frozen(model):
        found = model.taps(torch.zeros(1, model.clip_samples), layers)
    return [tuple(found[layer].shape[1:]) for layer in layers]


def parameters(config, shapes):
    """Of the head, on the device meta: some are too large to fill."""
    taken = shapes if config.target_layers == ["all"] else shapes[-1:]
    taken = [aggregate(torch.empty(1, *shape, device="meta"), config.aggregation).shape[1:] for shape in taken]
    with torch.device("meta"):
        head = build_probe_from_config(config, 10, "meta", input_dim=[tuple(shape) for shape in taken])
    return sum(parameter.numel() for parameter in head.parameters())
