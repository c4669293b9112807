"""Images that are not RGB: any number of channels, of 8 or 16 bits or of float32, through every step."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional

from dinov2.data import (
    AugmentationConfig,
    DataConfig,
    ImageFolder,
    MultiCropAugmentation,
    ShardImage,
    TarShards,
    UnreadableImageError,
    batches,
    decode_image,
    multichannel,
    normalize,
    open_dataset,
    read_image,
    write_shards,
)
from dinov2.data.cropping import resized_crop
from dinov2.data.decoding import LEVELS
from tests.data.files import encode, encode_array, noise
from tests.photometric import pillow

TYPES = [np.uint8, np.uint16, np.float32]
BY_PIXEL = {"photometric": "minisblack", "planarconfig": "contig"}


def bands(channels: int, dtype: type, height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth images over all of a type's levels, another one in each channel."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    share = 0.5 + 0.5 * np.sin(0.3 * x + 0.2 * y * (c + 1) + c)
    return (share * LEVELS[np.dtype(dtype)]).astype(dtype)


def config_of(channels: int, **fields: object) -> AugmentationConfig:
    sizes = {"global_size": 16, "local_size": 8, "local_crops": 2}
    return AugmentationConfig(mean=(0.5,) * channels, std=(0.25,) * channels, **sizes | fields)


def encode_tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


# --- decoding


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_arrays(channels: int, dtype: type) -> None:
    image = bands(channels, dtype)
    variants = [image, np.asfortranarray(image), image.astype(image.dtype.newbyteorder(">"))]
    for array in variants + ([image[..., 0]] if channels == 1 else []):
        found = decode_image(encode_array(array), "a", channels)
        assert found.dtype == np.dtype(dtype)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_bands_of_tiff(channels: int, dtype: type) -> None:
    image = bands(channels, dtype)
    by_band = image.transpose(2, 0, 1)
    for content in (
        encode_tiff(image, **BY_PIXEL),
        encode_tiff(by_band, photometric="minisblack", planarconfig="separate"),
        encode_tiff(by_band, photometric="minisblack"),  # one a page
        encode_tiff(image, **BY_PIXEL, compression="zlib", byteorder=">"),
        encode_tiff(image, **BY_PIXEL, bigtiff=True, tile=(16, 16)),
    ):
        found = decode_image(content, "a", channels)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint8, "PNG"), (np.uint16, "PNG"), (np.float32, "TIFF")])
def test_grey_keeps_its_depth(dtype: type, kind: str) -> None:
    image = bands(1, dtype)
    np.testing.assert_array_equal(decode_image(encode(image[..., 0], kind), "a", 1), image)


def test_grey_of_colour_is_luma() -> None:
    luma = np.asarray(ImageOps.grayscale(Image.fromarray(noise(0))))
    np.testing.assert_array_equal(decode_image(encode(noise(0)), "a", 1)[..., 0], luma)


def test_four_channels_of_pillow() -> None:
    image = noise(0, channels=4)
    np.testing.assert_array_equal(decode_image(encode(image), "a", 4), image)


def test_arrays_as_rgb() -> None:
    np.testing.assert_array_equal(decode_image(encode_array(noise(0)), "a"), noise(0))
    image = bands(3, np.uint16)
    np.testing.assert_array_equal(decode_image(encode_array(image), "a"), image >> 8)


def spoilt(value: float) -> np.ndarray:
    image = bands(2, np.float32)
    image[3, 4, 1] = value
    return image


@pytest.mark.parametrize(
    ("content", "channels", "reason"),
    [
        (encode(noise(0)), 4, r"expected \[H, W, 4\], got \[20, 30, 3\]"),
        (encode(noise(0)), 13, r"expected \[H, W, 13\]"),
        (encode_array(bands(12, np.uint8)), 13, r"expected \[H, W, 13\], got \[24, 40, 12\]"),
        (encode_array(bands(2, np.uint8)[..., 0]), 2, r"expected \[H, W, 2\]"),
        (encode_array(np.zeros((4, 0, 2), np.uint8)), 2, "expected"),
        (encode_array(np.zeros((4, 4, 2))), 2, r"array: expected .* got float64 \[4, 4, 2\]"),
        (encode_array(np.zeros(4, np.uint8)), 1, "array: expected"),
        (encode_array(bands(3, np.float32)), 3, "RGB: expected 8 or 16 bits per channel, got float32"),
        (encode_array(spoilt(np.nan)), 2, "NaN or an infinity"),
        (encode_array(spoilt(np.inf)), 2, "NaN or an infinity"),
        (encode_array(bands(2, np.uint8))[:500], 2, "cannot read image a"),
        (encode_tiff(bands(5, np.uint8), **BY_PIXEL)[:1000], 5, "cannot read image a"),
        (
            encode_tiff(np.zeros((2, 5, 8, 8), np.uint8), photometric="minisblack"),
            10,
            "expected rows, columns and bands",
        ),
        (encode_tiff(bands(5, np.uint8).astype(np.int16), **BY_PIXEL), 5, "pixels: expected uint8"),
        (b"\x93NUMPY\x09\x00", 2, "cannot read image a"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': object, 'fortran_order'", 2, "cannot read image a"),
    ],
)
def test_unreadable(content: bytes, channels: int, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode_image(content, "a", channels)


def test_arrays_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    content = encode_array(np.zeros((1, 1, 2), np.uint8))
    claims = content.replace(b"(1, 1, 2), }" + 6 * b" ", b"(99999999, 999, 2)}")[: len(content)]
    (tmp_path / "a.npy").write_bytes(claims)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(tmp_path / "a.npy", 2)


def test_pickles_are_never_loaded() -> None:
    file = io.BytesIO()
    np.save(file, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImageError, match="object"):
        decode_image(file.getvalue(), "a", 1)


# --- operations


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.97, 1.0, 1.4])
def test_8_bit_grey_is_pillows(factor: float) -> None:
    image = bands(1, np.uint8)
    for ours, pillows in (
        (multichannel.adjust_brightness, ImageEnhance.Brightness),
        (multichannel.adjust_contrast, ImageEnhance.Contrast),
    ):
        expected = np.asarray(pillows(Image.fromarray(image[..., 0])).enhance(factor))
        np.testing.assert_array_equal(ours(image, factor)[..., 0], expected)


@pytest.mark.parametrize("name", ["adjust_brightness", "solarize", "gaussian_blur", "flip"])
def test_8_bit_rgb_is_pillows(name: str) -> None:
    arguments = {"adjust_brightness": (1.3,), "solarize": (100,), "gaussian_blur": (1.2, 9), "flip": ()}[name]
    ours = getattr(multichannel, name)(noise(0), *arguments)
    np.testing.assert_array_equal(ours, getattr(pillow, name)(noise(0), *arguments))


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_the_truncated_gaussian(sigma: float, kernel_size: int) -> None:
    """It is so for images that are smaller than the kernel, too: their borders are reflected more than once."""
    for image in (noise(0), bands(3, np.uint8), noise(1)[:1, :2], noise(2)[:3, :1]):
        found = multichannel.gaussian_blur(image, sigma, kernel_size)
        difference = np.abs(found.astype(int) - pillow.gaussian_blur(image, sigma, kernel_size))
        assert difference.max() <= 1
        assert difference.mean() < 0.01


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 4, 13, 150])
def test_operations_are_those_of_each_channel(channels: int, dtype: type) -> None:
    """Against the formulas in double precision; whole levels are rounded down, those of the blur to the nearest."""
    image, full = bands(channels, dtype), LEVELS[np.dtype(dtype)]
    before, exact = image.copy(), image.astype(np.float64)
    mean = exact.mean(axis=(0, 1))
    mean = mean if dtype == np.float32 else np.floor(mean + 0.5)
    radius, sigma = 4, 1.2
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(exact, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = sum(weight * padded[:, i : i + image.shape[1]] for i, weight in enumerate(kernel))
    expected = {
        ("adjust_brightness", 1.4): 1.4 * exact,
        ("adjust_contrast", 1.4): mean + 1.4 * (exact - mean),
        ("gaussian_blur", sigma, 9): sum(weight * rows[i : i + image.shape[0]] for i, weight in enumerate(kernel)),
        ("solarize", 128): np.where(exact / full >= 128 / 255, full - exact, exact),
        ("flip",): exact[:, ::-1],
    }
    for (name, *arguments), values in expected.items():
        found = getattr(multichannel, name)(image, *arguments)
        assert found.dtype == image.dtype
        assert found.shape == image.shape
        np.testing.assert_array_equal(image, before)
        if dtype == np.float32:
            np.testing.assert_allclose(found, values, atol=1e-6)
        else:
            below = np.clip(values, 0, full) - found
            low, high = (-0.5, 0.5) if name == "gaussian_blur" else (0, 1)
            assert low - 0.01 <= below.min() <= below.max() <= high + 0.01, name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 13])
def test_crops_of_every_type(channels: int, dtype: type) -> None:
    image, full = bands(channels, dtype, 64, 80), LEVELS[np.dtype(dtype)]
    planes = torch.from_numpy(image[5:60, 7:77].transpose(2, 0, 1).astype(np.float64))
    exact = functional.interpolate(planes[None], (24, 24), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    found = resized_crop(image, (7, 5, 77, 60), 24)
    assert found.dtype == image.dtype
    if dtype == np.float32:
        np.testing.assert_allclose(found, exact, atol=4e-6)
    else:
        assert np.abs(found - np.clip(np.rint(exact), 0, full)).max() <= 1


def test_16_bit_levels_do_not_wrap() -> None:
    image = np.zeros((32, 32, 2), np.uint16)
    image[:, 16:] = 65535
    crop = resized_crop(image, (0, 0, 32, 32), 48)  # the filter overshoots at an edge
    assert set(np.unique(crop[:, :18])) <= set(range(20_000))
    assert (crop[:, -18:] > 45_000).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_normalize(dtype: type) -> None:
    image = bands(5, dtype)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)
    expected = ((image.astype(np.float64) / LEVELS[np.dtype(dtype)] - mean) / std).transpose(2, 0, 1)
    found = normalize(image, mean, std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=4e-6)


# --- whole views


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_views(channels: int, dtype: type) -> None:
    augment = MultiCropAugmentation(config_of(channels))
    global_crops, local_crops = augment(bands(channels, dtype), np.random.default_rng(0))
    assert [crop.shape for crop in global_crops] == [(channels, 16, 16)] * 2
    assert [crop.shape for crop in local_crops] == [(channels, 8, 8)] * 2
    for crop in global_crops + local_crops:
        assert crop.dtype == np.float32
        assert np.isfinite(crop).all()
        assert crop.std() > 0.05


def test_types_give_the_same_views_within_their_rounding() -> None:
    augment = MultiCropAugmentation(config_of(4, jitter=0.0))
    for seed in range(20):
        views = [
            np.concatenate(
                [crop.ravel() for part in augment(bands(4, dtype), np.random.default_rng(seed)) for crop in part]
            )
            for dtype in TYPES
        ]
        assert np.abs(views[0] - views[1]).mean() < 0.02  # a level of 8 bits is 0.016
        assert np.abs(np.clip(views[2], -2, 2) - views[1]).mean() < 0.001  # nothing clips float32


def test_colour_is_off_unless_there_are_three_channels() -> None:
    for channels in (1, 2, 4, 13):
        config = config_of(channels)
        assert config.channels == channels
        assert [config.colour(name) for name in ("saturation", "hue", "grayscale")] == [0, 0, 0]
        assert config_of(channels, saturation=0.0, hue=0.0, grayscale=0.0).colour("hue") == 0
        for name in ("saturation", "hue", "grayscale"):
            with pytest.raises(
                ValueError, match=rf"data\.augmentation\.{name}: expected 0 for the {channels} channels of mean"
            ):
                config_of(channels, **{name: 0.1})
    assert config_of(3).colour("hue") == 0.1


@pytest.mark.parametrize(
    "fields",
    [{"mean": (0.5,)}, {"mean": (), "std": ()}, {"mean": (0.5,), "std": (0.0,)}, {"mean": (0.5,), "std": (-1.0,)}],
)
def test_mean_and_std_go_together(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"(mean|std): expected"):
        AugmentationConfig(**fields)


@pytest.mark.parametrize("image", [bands(4, np.uint8), bands(5, np.uint8).astype(np.float64), bands(5, np.uint8)[0]])
def test_images_of_another_kind_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 or uint16 or float32 \[H, W, 5\], got "):
        MultiCropAugmentation(config_of(5))(image, np.random.default_rng(0))


# --- from files to batches


@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.float32), (13, np.uint16)])
def test_batches(tmp_path: Path, channels: int, dtype: type, source: str) -> None:
    files = {f"{i}": encode_array(bands(channels, dtype, 20 + i)) for i in range(5)}
    if channels > 1:
        files |= {"5": encode_tiff(bands(channels, dtype), **BY_PIXEL), "6": encode(noise(0))}
    if source == "folder":
        for name, content in files.items():
            (tmp_path / f"{name}.{'npy' if content[:1] == bytes([0x93]) else 'tif'}").write_bytes(content)
    else:
        report = write_shards([ShardImage(name, content) for name, content in files.items()], tmp_path, shard_size=3)
        assert report.images == len(files)
    config = DataConfig(root=tmp_path, augmentation=config_of(channels), num_workers=0)
    dataset = open_dataset(config)
    assert isinstance(dataset, ImageFolder if source == "folder" else TarShards)
    assert len(dataset) == len(files)
    run = batches(dataset, config, batch_size=4, patch_size=4, seed=0)
    if channels == 1:
        found = list(islice(run, 3))
    else:
        with pytest.warns(UserWarning, match=rf"1 of 7 so far; .*expected \[H, W, {channels}\], got \[20, 30, 3\]"):
            found = list(islice(run, 3))
    for batch in found:
        assert batch["global_crops"].shape == (8, channels, 16, 16)
        assert batch["local_crops"].shape == (8, channels, 8, 8)
        assert batch["global_crops"].isfinite().all()


def test_bundled_photographs_are_rgb() -> None:
    with pytest.raises(ValueError, match="root: expected a source of images with 13 channels, got None"):
        open_dataset(DataConfig(augmentation=config_of(13)))
