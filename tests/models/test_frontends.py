import kaldi_native_fbank as knf
import numpy as np
import pytest
import torch

from avex_export.architectures.spectra import use_products
from avex_serve.configs import AudioConfig
from avex_serve.models.frontends import EATFrontEnd, KaldiFbank, Spectrogram

POWERS = ["fft", "product", "folded"]  # how the power spectrum is taken
BINS = 80  # Kaldi itself refuses the 128 bins of BEATs, some of which see no frequency at 16 kHz


def fbank(power="fft", **options):
    settings = {"num_mel_bins": 128, "sample_frequency": 16000.0, "frame_length": 25.0, "frame_shift": 10.0}
    module = KaldiFbank(**{**settings, **options})
    if power != "fft":
        use_products(module, folded=power == "folded")
    return module


def kaldi(wave, bins, rate, window="povey"):
    """The same features by kaldi-native-fbank."""
    options = knf.FbankOptions()
    options.htk_compat = window == "hanning"  # as EAT asks for it
    options.frame_opts.window_type = window
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = bins
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(rate, wave.tolist())
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


def exact(module, wave):
    """The definition, in float64 and frame by frame."""
    window, mel = module.window.double().numpy(), module.mel_fb.double().numpy()
    rows = []
    for start in range(0, len(wave) - module.win_length + 1, module.hop_length):
        frame = wave[start : start + module.win_length].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, module.n_fft)) ** 2
        rows.append(np.log(np.maximum(power @ mel, np.finfo(np.float32).eps)))
    return np.stack(rows)


def wave(samples, seed=0):
    return (3000 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("samples", [400, 559, 560, 2800, 16000, 16001])
def test_features_are_kaldis(power, samples):
    signal = wave(samples)
    features = fbank(power, num_mel_bins=BINS)(torch.from_numpy(signal)[None])[0].numpy()
    expected = kaldi(signal, BINS, 16000)
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, atol=2e-3)


@pytest.mark.parametrize(("rate", "bins"), [(8000, 40), (32000, 64)])
def test_other_rates_and_bins_are_kaldis(rate, bins):
    signal = wave(rate)
    module = fbank(sample_frequency=float(rate), num_mel_bins=bins)
    np.testing.assert_allclose(
        module(torch.from_numpy(signal)[None])[0].numpy(), kaldi(signal, bins, rate), atol=2e-3
    )


@pytest.mark.parametrize("power", POWERS)
def test_the_other_window_is_kaldis(power):
    signal = wave(8000)
    module = fbank(power, num_mel_bins=BINS, window="hanning", in_state=False)
    features = module(torch.from_numpy(signal)[None])[0].numpy()
    np.testing.assert_allclose(features, kaldi(signal, BINS, 16000, "hanning"), atol=2e-3)
    assert np.abs(features - kaldi(signal, BINS, 16000)).max() > 0.1
    assert fbank(window="hanning", in_state=False).state_dict() == {}


@pytest.mark.parametrize("power", POWERS)
def test_features_are_the_definition(power):
    module, signal = fbank(power), wave(8000)
    features = module(torch.from_numpy(signal)[None])[0].numpy()
    np.testing.assert_allclose(features, exact(module, signal), atol=5e-4)


def test_the_matrix_product_is_the_more_exact_spectrum_where_a_band_is_nearly_empty():
    time = np.arange(16000) / 16000
    signal = (20000 * np.sin(2 * np.pi * (500 + 1000 * time) * time)).astype(np.float32)
    errors = {
        power: np.abs(fbank(power)(torch.from_numpy(signal)[None])[0].numpy() - exact(fbank(), signal)).max()
        for power in ("fft", "product")
    }
    assert errors["product"] < errors["fft"]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("until", [8000, 3700])
def test_a_recorders_offset_leaves_nothing_behind(power, until):
    quiet = np.random.default_rng(0).integers(-3, 4, 8000)
    signal = ((quiet + np.where(np.arange(8000) < until, 10000, 0)) / 2**15).astype(np.float32)
    features = fbank(power)(torch.from_numpy(signal)[None])[0].numpy()
    np.testing.assert_allclose(features, exact(fbank(), signal), atol=2e-5)


@pytest.mark.parametrize("power", POWERS)
def test_silence_is_the_floor(power):
    features = fbank(power)(torch.zeros(2, 1600))
    assert features.unique().tolist() == pytest.approx([np.log(np.finfo(np.float32).eps)])


def test_a_batch_is_its_rows():
    module, batch = fbank(), torch.from_numpy(np.stack([wave(3200, seed) for seed in range(3)]))
    rows = torch.cat([module(row[None]) for row in batch])
    torch.testing.assert_close(module(batch), rows, rtol=0, atol=1e-5)


def test_state_holds_what_avex_checkpoints_hold():
    assert {name: tuple(t.shape) for name, t in fbank().state_dict().items()} == {
        "window": (400,),
        "mel_fb": (257, 128),
    }


FRAMES = 32
LONGEST = 400 + (FRAMES - 1) * 160  # samples


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("samples", [400, 559, 3000, LONGEST - 1, LONGEST, LONGEST + 1, 8000])
def test_eats_features_are_kaldis_padded_or_cut_and_then_normalised(power, samples):
    module = EATFrontEnd(frames=FRAMES, mel_bins=BINS, mean=-4.0, std=4.5)
    module.fbank.power = fbank(power, window="hanning").power
    signal = wave(samples) / 2**15 + np.linspace(0, 0.5, samples, dtype=np.float32)
    expected = np.zeros((FRAMES, BINS))
    mel = kaldi(signal - signal.mean(dtype=np.float64), BINS, 16000, "hanning")[:FRAMES]
    expected[: len(mel)] = mel
    features = module(torch.from_numpy(signal)[None])[0].numpy()
    np.testing.assert_allclose(features, (expected + 4.0) / 9.0, atol=5e-4)


def test_eats_front_end_fixed_to_a_length_gives_the_same_features():
    for samples in (2000, 8000):
        module, batch = EATFrontEnd(frames=FRAMES, mel_bins=128, mean=0.0, std=0.5), torch.randn(2, samples)
        expected = module(batch)
        module.fbank.fixed_samples = min(samples, LONGEST)
        torch.testing.assert_close(module(batch), expected, rtol=0, atol=0)


def test_features_are_taken_in_full_precision_under_autocast():
    module, signal = fbank("folded"), torch.from_numpy(wave(3200))[None]
    with torch.autocast("cpu", torch.bfloat16):
        features = module(signal)
    torch.testing.assert_close(features, module(signal), rtol=0, atol=0)


# -- mel spectrogram -----------------------------------------------------------------------------------------------

MEL = {"n_fft": 800, "hop_length": 160, "n_mels": 64}


def spectrogram(power="fft", **fields):
    module = Spectrogram(AudioConfig(**{**MEL, **fields}))
    if power != "fft":
        use_products(module, folded=power == "folded")
    return module


def exact_spectrogram(signal, **fields):
    """The definition, in float64, frame by frame and filter by filter."""
    cfg = AudioConfig(**{**MEL, **fields})
    n_fft, hop = cfg.n_fft, cfg.hop_length or cfg.n_fft // 4
    length = cfg.win_length or n_fft
    edge = {"hann": 0.5, "hamming": 0.54}[cfg.window]
    window = np.zeros(n_fft)
    left = (n_fft - length) // 2
    window[left : left + length] = edge - (1 - edge) * np.cos(2 * np.pi * np.arange(length) / length)
    padded = np.pad(signal.astype(np.float64), n_fft // 2, mode="reflect") if cfg.center else signal
    starts = range(0, len(padded) - n_fft + 1, hop)
    power = np.stack([np.abs(np.fft.rfft(padded[i : i + n_fft] * window)) ** 2 for i in starts])
    top = 2595 * np.log10(1 + cfg.sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.arange(cfg.n_mels + 2) * top / (cfg.n_mels + 1) / 2595) - 1)
    hertz = np.linspace(0, cfg.sample_rate / 2, n_fft // 2 + 1)  # so in torchaudio for odd lengths too
    mel = np.stack([power @ np.interp(hertz, corners[i : i + 3], [0, 1, 0]) for i in range(cfg.n_mels)])
    found = mel if cfg.representation == "mel_spectrogram" else power.T
    if not cfg.normalize:
        return found
    found = np.log(found + 1e-6)
    return (found - found.min()) / (found.max() - found.min() + 1e-8)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_fft": 802},  # of which half is odd: the folded transform has no frequency in the middle
        {"hop_length": None},
        {"hop_length": 900},
        {"win_length": 401},
        {"window": "hamming"},
        {"n_mels": 20, "sample_rate": 32000},
        {"center": False},
        {"normalize": False},
        {"representation": "spectrogram", "n_fft": 402},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [1600, 8123])
def test_spectrograms_are_the_definition(power, fields, samples):
    signal = wave(samples) / 32768
    features = spectrogram(power, **fields)(torch.from_numpy(signal)[None])[0].numpy()
    expected = exact_spectrogram(signal, **fields)
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, atol=2e-5 * max(1.0, expected.max()))


def test_a_transform_of_odd_length():
    signal = wave(1600) / 32768
    features = spectrogram(n_fft=401)(torch.from_numpy(signal)[None])[0].numpy()
    np.testing.assert_allclose(features, exact_spectrogram(signal, n_fft=401), atol=2e-5)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("samples", [401, 16000])
def test_digital_silence_is_exactly_zero(power, samples):
    features = spectrogram(power)(torch.zeros(2, samples))
    assert features.shape == (2, 64, 1 + samples // 160)
    assert not features.any()


def test_a_clip_is_scaled_by_itself():
    module, batch = spectrogram(), torch.from_numpy(np.stack([wave(3200, seed) / 32768 for seed in range(3)]))
    batch[1] *= 1e-3
    rows = torch.cat([module(row[None]) for row in batch])
    torch.testing.assert_close(module(batch), rows, rtol=0, atol=1e-5)
    assert torch.equal(rows.amin(dim=(1, 2)), torch.zeros(3))
    torch.testing.assert_close(rows.amax(dim=(1, 2)), torch.ones(3))


def test_autocast_leaves_mel_features_alone():
    module, signal = spectrogram(), torch.from_numpy(wave(3200) / 32768)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = module(signal)
    torch.testing.assert_close(features, module(signal), rtol=0, atol=0)
