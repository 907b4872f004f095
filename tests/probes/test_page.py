"""The page on avex's probe API: every snippet of it runs with the import renamed, at full size."""

import inspect
import re
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import build_probe_from_config
from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.registry import get_model_spec
from tests.hub import hub_cache, use_cache
from tests.shared import shared

PAGE = next(shared("seeds").glob("*.txt")).read_text()
MODEL = "esp_aves2_naturelm_audio_v1_beats"
REPOSITORY = "EarthSpeciesProject/esp-aves2-naturelm-audio-v1-beats"


def snippets():
    """The page's Python: it has lost its fences and its indentation, and prose is glued to closing brackets."""
    lines = re.sub(r"\)(?=[A-Z])|(?<=\S)(?=from avex)", lambda glue: f"{glue.group()}\n", PAGE).splitlines()
    found, position = [], 0
    while position < len(lines):
        end = longest_code(lines, position) if lines[position].startswith("from avex") else position
        if end > position:
            found.append(indented(lines[position:end]))
        position = max(end, position + 1)
    return [code for code in found if "def build_probe" not in code]


def longest_code(lines, start):
    best = start
    for end in range(start + 1, min(start + 60, len(lines)) + 1):
        # A line like "key: value" is YAML, and "Word:" begins a list.
        if re.match(r"^\w[\w ]*: \S|^[A-Z][\w /]*:$|^- |^# my_linear", lines[end - 1]):
            break
        try:
            compile(indented(lines[start:end]), "page", "exec")
        except SyntaxError:
            continue
        best = end
    return best


def indented(lines):
    """Whatever follows the head of a loop or a with statement stands inside it."""
    code, depth = [], 0
    for line in lines:
        code.append("    " * depth + line)
        if re.match(r"^(for|with) .*:$", line):
            depth += 1
    return textwrap.dedent("\n".join(code)) + "\n"


SNIPPETS = snippets()


class MyModel(ModelBase):
    """A model whose layer has the name that one snippet uses."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 64)

    def get_model_layers(self):
        return ["layer_12"]

    def tappable_layers(self):
        return self.get_model_layers()

    def taps(self, wave, layers, padding_mask=None, *, as_if_alone=False):
        return {"layer_12": self.layer(self.process_audio(wave)[:, ::1600, None])}

    @property
    def clip_samples(self):
        return 16000


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with the model's checkpoint, of random weights."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = build_model_from_spec(get_model_spec(MODEL), "cpu", return_features_only=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = "esp-aves2-naturelm-audio-v1-beats.safetensors"
    hub_cache(home, REPOSITORY, file, lambda path: save_file(weights, path))
    return home


def test_the_page_has_its_snippets():
    assert len(SNIPPETS) >= 9
    code = "".join(SNIPPETS)
    for part in ("load_probe_config", "input_dim=768", 'probe_type="attention"', "for probe_type, extra_cfg in"):
        assert part in code


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippet_runs(code, hub, tmp_path, monkeypatch):
    use_cache(monkeypatch, hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_probe.yml").write_text("probe_type: linear\ntarget_layers: [backbone]\n")
    (tmp_path / "my_linear_probe.yml").write_text(yaml_of("my_linear_probe.yml", prefix=""))
    (tmp_path / "custom_probe.yml").write_text(yaml_of("custom_probe.yml", prefix="# "))
    names = {"torch": torch, "embeddings": torch.randn(2, 768), "my_model": MyModel()}
    exec(compile(code.replace("avex", "avex_serve").replace("avex_serve_", "avex_"), "page", "exec"), names)
    probe = names.get("probe")
    if probe is not None:
        width = probe.num_classes
        example = torch.randn(2, 768) if probe.base_model is None else 0.1 * torch.randn(1, 16000)
        with torch.no_grad():
            assert probe.eval()(example).shape == (len(example), width)


def yaml_of(name, prefix):
    """The YAML that stands on the page under `# name`."""
    rest = PAGE[PAGE.index(f"# {name}\n") + len(name) + 3 :].splitlines()
    fields = []
    for line in rest:
        if not line.startswith(prefix) or not re.match(r"^\w+: ", line.removeprefix(prefix)):
            break
        fields.append(line.removeprefix(prefix))
    # The last line of a block has the next snippet glued to it.
    return "\n".join(re.sub(r"(true|false|mean)from .*", r"\1", field) for field in fields) + "\n"


def test_the_signature_is_the_pages():
    parameters = inspect.signature(build_probe_from_config).parameters
    shown = re.search(r"def build_probe_from_config\((.*?)\)", PAGE, re.DOTALL).group(1)
    assert list(parameters) == [part.split(":")[0].strip(" *\n") for part in shown.strip().rstrip(",").split(",\n")]
