"""Plain passes for evaluation: every sample once, in order."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.config import ConfigError
from vtp.data.passes import captioned_batches, class_names, image_batches, labelled_batches
from vtp.data.sources import open_source
from vtp.images import center_crop, normalise


def class_folder(root):
    for i in range(9):
        folder = root / ("a", "a", "b", "c", "c", "c")[i % 6]
        folder.mkdir(exist_ok=True)
        pixels = np.full((20, 30, 3), i * 10, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
    return open_source(str(root))


def test_labelled_batches_have_all_samples_in_order(tmp_path):
    source = class_folder(tmp_path)
    batches = list(labelled_batches(source, "class", 16, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (9, 3, 16, 16)
    expected = normalise(torch.full((1, 3, 16, 16), 70, dtype=torch.uint8))
    keys = [key for _, batch in image_batches(source, 16, 4) for key in batch]
    torch.testing.assert_close(images[keys.index("a/7.png")], expected[0])


def test_the_commonest_classes(tmp_path):
    source = class_folder(tmp_path)
    assert class_names(source, "class") == ("a", "b", "c") and class_names(source, "class", 2) == ("a", "c")
    labels = torch.cat([labels for _, labels in labelled_batches(source, "class", 16, 4, top=2)])
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(ConfigError, match="no label 'colour'.*class"):
        class_names(source, "colour")


def test_limits_spread_over_a_sorted_folder(tmp_path):
    source = class_folder(tmp_path)
    labels = torch.cat([labels for _, labels in labelled_batches(source, "class", 16, 4, limit=5)])
    assert len(labels) == 5 and len(labels.unique()) > 1
    ((images, keys),) = image_batches(source, 16, 8, limit=2)
    assert len(images) == len(keys) == 2


def test_squash_or_centre_crop(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    ((cropped, _),) = image_batches(source, 16, 1, resize=center_crop)
    ((squashed, _),) = image_batches(source, 16, 1)
    assert cropped.min() > 2 and squashed.min() < -1


def test_broken_pictures_are_left_out_of_a_pass_and_counted(tmp_path):
    source = class_folder(tmp_path)
    (tmp_path / "b" / "0.png").write_bytes(b"nonsense")
    source = open_source(str(tmp_path))
    assert sum(len(labels) for _, labels in labelled_batches(source, "class", 16, 4)) == 9
    assert source.report == {"samples": 10, "not an image": 1}


def test_captioned_batches_of_scenes():
    ((images, captions),) = itertools.islice(captioned_batches(open_source("scenes:test"), 16, 32), 1)
    assert len(images) == len(captions) == 32 and all(len(c) == 1 for c in captions)


def test_labelled_scenes():
    source = open_source("scenes:test")
    batches = list(labelled_batches(source, "letter", 32, 64, limit=150))
    assert sum(len(labels) for _, labels in batches) == 150
    assert class_names(source, "letter")[0] == "A"
