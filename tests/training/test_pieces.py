"""Which names are those of clips from one recording."""

import pytest

from avex_serve.training.pieces import recordings_of


@pytest.mark.parametrize(
    ("stems", "seconds", "source"),
    [
        (["rec1_0.0s_3.0s", "rec1_6.0s_9.0s"], 3, "rec1"),
        (["rec1_10_15", "rec1_35_40"], 5, "rec1"),
        (["0.912_1_dawn chorus_3.0s_6.0s", "0.413_2_dawn chorus_9.0s_12.0s"], 3, "dawn chorus"),
        (["site_20240501_060000_seg1", "site_20240501_060000_seg3"], 7, "site_20240501_060000"),
        (["rec 1 - part 1", "rec 1 - part 2"], 60, "rec 1"),
        (["SITE_20240501_060000_1", "SITE_20240501_060000_2"], 3, "SITE_20240501_060000"),
        (["XC564654_003", "XC564654_004"], 3, "XC564654"),
        (
            ["XC564654 - Turtle Dove - Streptopelia turtur_1", "XC564654 - Turtle Dove - Streptopelia turtur_2"],
            3,
            "",
        ),
        (["rec1_000", "rec1_010", "rec1_070"], 10, "rec1"),
        (["dawn_0", "dawn_5", "dawn_15", "dawn_20", "dawn_25"], 5, "dawn"),
    ],
)
def test_clips_of_one_recording(stems, seconds, source):
    assert recordings_of(stems, [seconds] * len(stems)) == [source or stems[0].rpartition("_")[0]] * len(stems)


@pytest.mark.parametrize(
    ("stems", "seconds"),
    [
        ([f"robin_{i}" for i in range(40)], 3),
        ([f"robin {i:03}" for i in range(1, 40)], 1),
        (["robin_3", "robin_6"], 3),  # may be chance
        ([f"XC{564654 + i}" for i in range(40)], 5),
        ([f"XC{564654 + 7 * i} - Turtle Dove - Streptopelia turtur" for i in range(9)], 5),
        ([f"SITE_20240501_{hour:02}0000" for hour in range(24)], 60),  # hours of a recorder
        ([f"2024050{day}_060000" for day in range(1, 9)], 60),
        ([f"S4A01234_2024050{day}_06300{day}" for day in range(1, 9)], 10),
        ([f"{fold}-{100032 + 178 * i}-A-{i}" for fold in range(1, 6) for i in range(50)], 5),  # ESC-50
        ([f"{6 * 10**7 + 10**6 * i}{i:03}" for i in range(40)], 2),  # Watkins
        ([f"iNat_{4000 + 37 * i}" for i in range(40)], 5),
        ([f"site{i % 4}_clip_{i}_{i * i}" for i in range(40)], 3),
        (["CHE_01_20190101_163410", "XC564654-200602-006_NR5N6_20h14_Sturtur", "birds_10s"], 10),
    ],
)
def test_independent_recordings(stems, seconds):
    found = [name for name in recordings_of(stems, [seconds] * len(stems)) if name is not None]
    assert len(found) == len(set(found)), "no two of one recording"
