import numpy as np
import pytest

from vtp.data import scenes

PICTURES = [scenes.draw(i, 32) for i in range(400)]


def test_a_picture_is_a_function_of_seed_and_index():
    again = [scenes.draw(i, 32) for i in reversed(range(50))][::-1]
    for first, second in zip(PICTURES, again, strict=False):
        assert first.caption == second.caption and first.labels == second.labels
        np.testing.assert_array_equal(first.image, second.image)
    assert len({scenes.draw(i).image.tobytes() for i in range(200)}) == 200
    assert all(scenes.draw(i, seed=1).caption != PICTURES[i].caption for i in range(5))


@pytest.mark.parametrize("size", [16, 48, 256])
def test_what_is_in_a_picture_does_not_depend_on_the_size_it_is_drawn_at(size):
    for i in range(20):
        scene = scenes.draw(i, size)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert (scene.caption, scene.labels) == (PICTURES[i].caption, PICTURES[i].labels)


def test_larger_drawings_show_the_same():
    def difference(i, j):
        small = scenes.draw(i, 64).image.reshape(16, 4, 16, 4, 3).mean((1, 3))
        large = scenes.draw(j, 128).image.reshape(16, 8, 16, 8, 3).mean((1, 3))
        return np.abs(small - large).mean()

    same = [difference(i, i) for i in range(60)]  # places and textures move by up to a pixel
    assert np.mean(same) < 3 and max(same) < 15
    assert np.mean([difference(i, i + 1) for i in range(60)]) > 30


def test_training_and_held_out_indices_are_disjoint():
    assert not set(scenes.TEST) & set(range(len(scenes.TRAIN))) and scenes.TRAIN.stop <= scenes.TEST.start
    train = {scenes.draw(i).image.tobytes() for i in scenes.TRAIN[:2000]}
    assert not train & {scenes.draw(i).image.tobytes() for i in scenes.TEST[:500]}


def test_labels_agree_with_captions():
    for _, caption, labels in PICTURES:
        names = {label: scenes.CLASSES[label][i] for label, i in labels.items()}
        words = caption.replace('"', "").replace("stars", "star").split()
        for label in ("colour", "word", "letter"):
            assert label not in names or names[label] in words
        if "shape" in names:
            assert any(w.startswith(names["shape"]) for w in words)
        if labels.get("count", 0) > 0:
            assert names["count"] in words or str(labels["count"] + 1) in words
        said = [t for t in scenes.TEXTURES if t in words] + [s for s in scenes.SIZES if s in words]
        if "relation" not in labels:
            assert all(word in names.values() for word in said)
        else:
            opposite = scenes.RELATIONS[labels["relation"] ^ 1]
            assert f" {names['relation']} a small " in caption or f" {opposite} a large " in caption


def test_every_class_of_every_label_occurs_and_every_picture_has_one():
    seen = {label: set() for label in scenes.CLASSES}
    for i in range(3000):
        labels = scenes.draw(i, 16).labels
        assert labels
        for label, value in labels.items():
            seen[label].add(value)
    assert seen == {label: set(range(len(names))) for label, names in scenes.CLASSES.items()}


def test_the_colour_that_a_label_names_is_the_one_painted():
    for image, caption, labels in PICTURES:
        pixels = image.reshape(-1, 3).astype(float)
        border = np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))
        strength = np.abs(pixels - np.median(border, 0)).sum(1)
        if labels.get("texture", 0) == 0 and "colour" in labels and "word" not in labels:
            painted = pixels[strength > 0.8 * strength.max()].mean(0)
            distance = np.abs(scenes._RGB * 0.93 - painted).sum(1)
            assert distance.argmin() == labels["colour"], caption


def test_templates_have_one_place_for_the_class_of_each_label():
    assert scenes.TEMPLATES.keys() == scenes.CLASSES.keys()
    for templates in scenes.TEMPLATES.values():
        assert all(t.count("{}") == 1 for t in templates)


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="16 pixels"):
        scenes.draw(0, 8)
