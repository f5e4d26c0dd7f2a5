"""Views of images against Pillow, `colorsys` and NumPy, and how they are drawn."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from experiments.augmentation import (
    Distortion,
    distort,
    draw_distortion,
    random_view,
    standardize,
)

PLACES = [(row, column) for row in range(5) for column in range(5)]
NEUTRAL = Distortion(2, 2, False, 0.0, 1.0, 1.0)

# Relative error of a mean over the 3072 entries of an image. In which order XLA adds
# float32 numbers depends on the processor: at worst one after the other, half a unit
# in the last place each.
MEAN_TOLERANCE = 1e-4

# Jitted once for all tests, which save their time by using batches of one size.
draw_all = jax.jit(jax.vmap(draw_distortion))
distort_one = jax.jit(distort)
distort_all = jax.jit(jax.vmap(distort))
standardize_one = jax.jit(standardize)
random_views = jax.jit(jax.vmap(random_view))


def constant_image(*colour):
    return np.full((32, 32, 3), colour, np.uint8)


def random_images():
    """Images of all kinds, uint8 `[12, 32, 32, 3]`."""
    rng = np.random.default_rng(0)
    return np.stack(
        [
            *rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
            rng.integers(0, 2, (32, 32, 3), np.uint8),  # Brightness makes it negative.
            rng.integers(0, 2, (32, 32, 3), np.uint8) * np.uint8(255),
            np.broadcast_to(rng.integers(0, 256, (32, 32, 1), np.uint8), (32, 32, 3)),
            constant_image(0, 0, 0),
            constant_image(255, 255, 255),
            constant_image(128, 128, 128),
            constant_image(255, 0, 0),
            constant_image(10, 200, 30),
        ]
    )


def drawn(count, seed=0):
    """Independent distortions, each field `[count]`."""
    return draw_all(jax.random.split(jax.random.key(seed), count))


def with_only(names, distortions):
    """Distortions with nothing but the named parts left in them."""
    count = len(distortions.row)
    neutral = {
        name: jnp.full(count, getattr(NEUTRAL, name), getattr(distortions, name).dtype)
        for name in set(Distortion._fields) - set(names)
    }
    return distortions._replace(**neutral)


def reference_geometry(image, distortion):
    """Margin, crop and mirror by Pillow."""
    left, upper = int(distortion.column), int(distortion.row)
    height, width, _ = image.shape
    view = ImageOps.expand(Image.fromarray(image), border=2, fill=0)
    view = view.crop((left, upper, left + width, upper + height))
    return np.asarray(ImageOps.mirror(view) if distortion.mirrored else view)


def saturated(pixel, factor):
    """One pixel with its saturation scaled and held in 0..1."""
    if max(pixel) <= 0:  # TensorFlow: no saturation, hence grey.
        return (max(pixel),) * 3
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb(hue, min(max(saturation * factor, 0.0), 1.0), value)


def reference_view(image, distortion):
    """What `distort` should give, in float64, pixel by pixel."""
    view = reference_geometry(image, distortion) + np.float64(distortion.brightness)
    pixels = [
        saturated(pixel, float(distortion.saturation))
        for pixel in view.reshape(-1, 3).tolist()
    ]
    view = np.array(pixels).reshape(view.shape)
    means = np.array([view[:, :, channel].mean() for channel in range(3)])
    return means + np.float64(distortion.contrast) * (view - means)


def reference_standardize(image):
    image = image.astype(np.float64)
    return (image - image.mean()) / max(image.std(), image.size**-0.5)


def each(distortions):
    """The distortions one by one, in NumPy."""
    return [
        Distortion(*fields)
        for fields in zip(*map(np.asarray, distortions), strict=True)
    ]


# ---- Each operation ----------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("row", "column"),
        ("mirrored",),
        ("brightness",),
        ("saturation",),
        ("contrast",),
        ("brightness", "saturation"),
        Distortion._fields,
    ],
    ids="-".join,
)
def test_operations_agree_with_their_references(names):
    images = random_images()
    distortions = with_only(names, drawn(len(images)))
    expected = [
        reference_view(image, distortion)
        for image, distortion in zip(images, each(distortions), strict=True)
    ]
    views = distort_all(images, distortions)
    assert views.dtype == jnp.float32
    np.testing.assert_allclose(views, expected, rtol=0, atol=256 * MEAN_TOLERANCE)
    # The references tell the operation from its absence.
    assert np.abs(images - np.array(expected)).max() > 0.2


def test_every_crop_and_its_mirror_image_are_pillows():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    distortions = [
        NEUTRAL._replace(row=row, column=column, mirrored=mirrored)
        for row, column in PLACES
        for mirrored in (False, True)
    ]
    expected = [reference_geometry(image, distortion) for distortion in distortions]
    assert len(np.unique(expected, axis=0)) == 50
    stacked = Distortion(*map(jnp.array, zip(*distortions, strict=True)))
    views = distort_all(np.stack([image] * 50), stacked)
    np.testing.assert_allclose(views, expected, rtol=0, atol=256 * MEAN_TOLERANCE)


def test_contrast_of_a_grey_image_is_pillows():
    # Elsewhere Pillow's contrast is another: about the mean luma, rounded and clipped.
    grey = np.random.default_rng(0).integers(78, 178, (32, 32, 1), np.uint8)
    image = np.broadcast_to(grey, (32, 32, 3))
    expected = ImageEnhance.Contrast(Image.fromarray(image)).enhance(1.8)
    only_contrast = Distortion(*map(jnp.asarray, NEUTRAL._replace(contrast=1.8)))
    view = distort_one(image, only_contrast)
    np.testing.assert_allclose(view, np.asarray(expected), rtol=0, atol=1.5)


def test_nothing_is_clipped_but_the_saturation():
    image = random_images()[5]  # Of 0 and 255 only.
    strong = NEUTRAL._replace(brightness=-0.2, saturation=1.5, contrast=1.8)
    view = distort_one(image, Distortion(*map(jnp.asarray, strong)))
    assert view.min() < -90
    assert view.max() > 345


# ---- Standardisation ---------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        *random_images()[[0, 4, 5, 10]],
        np.arange(28 * 28).reshape(28, 28, 1).astype(np.uint8),
        300 * np.random.default_rng(0).random((32, 32, 3), np.float32) - 20,
        1e-3 * np.random.default_rng(0).random((32, 32, 3), np.float32),
    ],
    ids=["random", "dark", "binary", "red", "one channel", "float", "nearly constant"],
)
def test_standardize_agrees_with_numpy(image):
    result = standardize_one(image)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(
        result, reference_standardize(image), rtol=MEAN_TOLERANCE, atol=MEAN_TOLERANCE
    )


def test_standardize_divides_by_no_less_than_the_root_of_the_size():
    image = np.zeros((32, 32, 3), np.float32)
    image[0, 0, 0] = 1e-3
    # The deviation of this image is 1.8e-5; 1/√n is 1.8e-2.
    np.testing.assert_allclose(
        standardize_one(image).max(), 1e-3 * np.sqrt(3072), rtol=1e-3
    )


@pytest.mark.parametrize("level", [0.0, 77.3, 128.2, 250.1, 255.0])
def test_standardize_makes_a_constant_image_zero(level):
    image = np.full((32, 32, 3), level, np.float32)
    np.testing.assert_array_equal(standardize_one(image), np.zeros_like(image))


# ---- The whole ---------------------------------------------------------------------


def test_random_view_is_the_reference_at_the_drawn_distortion():
    images = random_images()
    keys = jax.random.split(jax.random.key(1), len(images))
    expected = [
        reference_standardize(reference_view(image, distortion))
        for image, distortion in zip(images, each(draw_all(keys)), strict=True)
    ]
    views = random_views(images, keys)
    assert views.dtype == jnp.float32
    np.testing.assert_allclose(views, expected, rtol=0, atol=10 * MEAN_TOLERANCE)


def test_constant_images_give_finite_views():
    levels = np.linspace(0, 255, 12).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (12, 32, 32, 3))
    colours = with_only(("brightness", "saturation", "contrast"), drawn(12))
    for view in distort_all(images, colours):
        assert np.isfinite(standardize_one(view)).all()
    keys = jax.random.split(jax.random.key(2), 12)
    assert np.isfinite(random_views(images, keys)).all()


def test_random_view_crops_and_mirrors_uniformly():
    # Of a grey image the colours change nothing but mean and deviation, which the
    # standardisation takes away: the view is one of 50, told apart by correlation.
    grey = np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8)
    image = np.broadcast_to(grey, (32, 32, 3))
    candidates = np.stack(
        [
            reference_standardize(
                reference_geometry(
                    image,
                    NEUTRAL._replace(row=row, column=column, mirrored=mirrored),
                )
            )
            for row, column in PLACES
            for mirrored in (False, True)
        ]
    )
    keys = jax.random.split(jax.random.key(3), 1000)
    views = jax.jit(jax.vmap(random_view, in_axes=(None, 0)))(image, keys)
    correlation = np.einsum("vhwc,ehwc->ve", views, candidates, optimize=True) / 3072
    best = np.sort(correlation, axis=1)
    np.testing.assert_allclose(best[:, -1], 1.0, atol=1e-5)
    assert (best[:, -2] < 0.9).all()
    found = correlation.argmax(axis=1)
    assert stats.chisquare(np.bincount(found, minlength=50)).pvalue > 0.01


def test_every_key_gives_a_view_of_its_own():
    images = np.stack([random_images()[0]] * 12)
    keys = jax.random.split(jax.random.key(4), 12)
    views = random_views(images, keys)
    assert len(np.unique(views, axis=0)) == 12
    np.testing.assert_array_equal(random_views(images, keys[::-1])[::-1], views)


def test_scan_and_nested_vmap_give_the_same_views():
    images = random_images()
    keys = jax.random.split(jax.random.key(5), 12)
    expected = random_views(images, keys)
    one_by_one = jax.lax.map(lambda pair: random_view(*pair), (images, keys))
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=10 * MEAN_TOLERANCE)
    nested = jax.vmap(random_views)(images.reshape(3, 4, 32, 32, 3), keys.reshape(3, 4))
    np.testing.assert_allclose(nested.reshape(images.shape), expected, atol=1e-4)


def test_a_key_means_the_same_under_64_bits(request):
    images = random_images()
    key_data = jax.random.key_data(jax.random.split(jax.random.key(6), len(images)))
    expected = random_views(images, jax.random.wrap_key_data(key_data))
    request.getfixturevalue("x64")
    views = random_views(images, jax.random.wrap_key_data(key_data))
    assert views.dtype == jnp.float32
    np.testing.assert_allclose(views, expected, atol=1e-5)
    distortion = draw_distortion(jax.random.key(6))
    assert [field.dtype.itemsize for field in distortion] == [4, 4, 1, 4, 4, 4]


def test_a_batch_is_no_image():
    images = jnp.asarray(random_images())
    with pytest.raises(ValueError, match=r"\(12, 32, 32, 3\).*jax\.vmap"):
        standardize(images)
    with pytest.raises(ValueError, match=r"\(12, 32, 32, 3\).*jax\.vmap"):
        random_view(images, jax.random.key(0))


# ---- What is drawn -----------------------------------------------------------------


def test_crops_and_mirrors_are_uniform():
    distortions = drawn(20_000)
    counts = np.zeros((5, 5, 2))
    indices = tuple(np.asarray(field).astype(int) for field in distortions[:3])
    np.add.at(counts, indices, 1)
    assert stats.chisquare(counts, axis=None).pvalue > 0.01
    # Rounding to the nearest place would give those at the ends half their share.
    ends = np.array([0.5, 1, 1, 1, 0.5]) / 4
    wrong_places = np.einsum("i,j,k->ijk", ends, ends, [0.5, 0.5])
    wrong_mirror = np.einsum(
        "i,j,k->ijk", np.full(5, 0.2), np.full(5, 0.2), [0.45, 0.55]
    )
    for wrong in (wrong_places, wrong_mirror):
        assert stats.chisquare(counts, 20_000 * wrong, axis=None).pvalue < 1e-6


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", -63 / 255, 63 / 255),
        ("saturation", 0.5, 1.5),
        ("contrast", 0.2, 1.8),
    ],
)
def test_colours_are_uniform_over_their_ranges(name, low, high):
    values = np.asarray(getattr(drawn(20_000), name), np.float64)
    assert values.min() >= low - 1e-7
    assert values.max() <= high + 1e-7
    width = high - low
    assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 0.01
    assert stats.kstest(values, stats.uniform(low, 1.05 * width).cdf).pvalue < 1e-6
    assert (
        stats.kstest(values, stats.norm(low + width / 2, width / 4).cdf).pvalue < 1e-6
    )


def test_parts_of_a_distortion_are_independent():
    fields = np.stack([np.asarray(field, np.float64) for field in drawn(20_000)])
    correlation = np.corrcoef(fields) - np.eye(len(fields))
    assert np.abs(correlation).max() < 4 / np.sqrt(20_000)
