"""Every kind of stored image as the RGB that it shows."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vicinal.train.data.decode import WHITE, UnreadableImage, has_image_header, image_suffixes, open_image


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def row(content):
    """The RGB values of an image of one row."""
    image = open_image(content, "it")
    assert image.mode == "RGB"
    assert image.size[1] == 1
    return np.asarray(image)[0].tolist()


def greys(content):
    """The values of an image of one row that is grey."""
    pixels = np.asarray(open_image(content, "it"))[0]
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


def tiff(values, dtype, bits, sample_format=1, photometric=1):
    """A TIFF file of one row, of kinds that Pillow reads and does not write."""
    data = np.array(values, dtype).tobytes()
    data += b"\0" * (len(data) % 2)
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in {**tags, 339: sample_format}.items()
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 10) + entries + bytes(4)


def png(color_type, values, *chunks):
    """A PNG file of one row of 16-bit values."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + np.array(values, ">u2").tobytes()))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


SIXTEEN = np.array([[0, 129, 2570, 40000, 65535]], np.uint16)
SCALED = [0, 1, 10, 156, 255]  # v / 257


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000", "IM"])
def test_16_bits_are_scaled_by_their_range(kind):
    assert greys(encode(Image.fromarray(SIXTEEN), kind)) == SCALED


def test_other_integers_of_up_to_16_bits_are_scaled_by_their_range():
    big_endian = Image.frombytes("I;16B", (5, 1), SIXTEEN.astype(">u2").tobytes())
    assert greys(encode(big_endian, "TIFF")) == SCALED
    assert greys(tiff(SIXTEEN[0], "<u2", 16, photometric=0)) == [255, 254, 245, 99, 0]
    assert greys(tiff([0, 100, 16384, 32767], "<i2", 16, sample_format=2)) == [0, 1, 128, 255]
    # 0x000 0x800 and 0x400 0xfff, two in three bytes.
    assert greys(tiff([0x00, 0x08, 0x00, 0x40], "u1", 12))[:2] == [0, 128]
    assert row(png(2, [[0, 0, 0], [2570, 65535, 257]])) == [[0, 0, 0], [10, 255, 1]]
    assert greys(png(4, [[65535, 0], [2570, 65535]])) == [255, 10]


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "white"),
    [
        ([0, 10, 200, 255], np.int32, [0, 10, 200, 255], 255),
        ([0, 2570, 40000, 65535], np.int32, SCALED[:1] + SCALED[2:], 65535),
        ([0, 2**29, 2**30, 2**31 - 1], np.int32, [0, 64, 128, 255], 2**31 - 1),
        ([0, 2**30, 2**31, 2**32 - 1], np.uint32, [0, 64, 128, 255], 2**32 - 1),
        ([0, 0.25, 0.5, 1], np.float32, [0, 64, 128, 255], 1),
        ([0, 10, 200.4, 255], np.float32, [0, 10, 200, 255], 255),
        ([0, 2570, 40000, 65535], np.float32, SCALED[:1] + SCALED[2:], 65535),
        ([0, 0, 0, 0], np.float32, [0, 0, 0, 0], None),
    ],
)
def test_32_bits_are_scaled_by_the_least_range_that_holds_them(values, dtype, expected, white):
    if dtype == np.uint32:
        content = tiff(values, "<u4", 32)
    else:
        content = encode(Image.fromarray(np.array([values], dtype)), "TIFF")
    assert greys(content) == expected
    assert open_image(content).info == ({} if white is None else {WHITE: white})
    if dtype == np.float32:
        assert greys(encode(Image.fromarray(np.array([values], dtype)), "PPM")) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(Image.fromarray(np.array([[-5, 3]], np.int32)), "TIFF"), "lie between -5 and 3"),
        (encode(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"), "reach 70000, which is all black in 32"),
        (tiff([-4, 100], "<i2", 16, sample_format=2), "lie between -4 and 100, not between 0 and 32767"),
        (encode(Image.fromarray(np.array([[0, 1e6]], np.float32)), "TIFF"), r"between 0 and 1e\+06"),
        (encode(Image.fromarray(np.array([[-0.1, 1]], np.float32)), "TIFF"), "between -0.1 and 1, not"),
        (encode(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF"), "between nan and nan"),
    ],
)
def test_values_without_a_place_between_black_and_white_are_unreadable(content, message):
    with pytest.raises(UnreadableImage, match=f"cannot read image it: .*{message}"):
        open_image(content, "it")


CLEAR = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 255, 255], [0, 0, 0, 128]]], np.uint8))
ON_WHITE = [[255, 255, 255], [0, 0, 255], [127, 127, 127]]


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TGA", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_transparent_pixels_show_white(kind, options):
    assert row(encode(CLEAR, kind, **options)) == ON_WHITE


def test_every_kind_of_transparency():
    assert row(encode(CLEAR.convert("PA"), "TIFF")) == ON_WHITE
    assert greys(encode(CLEAR.convert("LA"), "PNG")) == [255, 29, 127]
    colors = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    colors.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert row(encode(colors, "PNG")) == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for kind in ("PNG", "GIF"):
        assert row(encode(colors, kind, transparency=0)) == [[255, 255, 255], [0, 255, 0], [0, 0, 255]]
    assert row(encode(colors, "PNG", transparency=bytes([255, 128, 0]))) == [[255, 0, 0], [127, 255, 127], [255] * 3]
    grey = Image.fromarray(np.array([[0, 5, 6]], np.uint8))
    assert greys(encode(grey, "PNG", transparency=5)) == [0, 255, 6]
    assert greys(encode(Image.fromarray(SIXTEEN), "PNG", transparency=2570)) == [0, 1, 255, 156, 255]
    red = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8))
    assert row(encode(red, "PNG", transparency=(255, 0, 0))) == [[255, 255, 255], [0, 0, 0]]
    assert row(png(6, [[65535, 0, 0, 0], [2570, 0, 0, 65535]])) == [[255, 255, 255], [10, 0, 0]]


def test_other_modes_are_the_colours_they_mean():
    assert greys(encode(Image.fromarray(np.array([[False, True]])), "PNG")) == [0, 255]
    red = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    assert row(encode(red, "TIFF")) == row(encode(red, "JPEG", quality=100)) == [[255, 0, 0]] * 2
    # JPEG's colours of a pixel are those of ITU-R BT.601 up to rounding.
    mixed = row(encode(Image.new("RGB", (1, 1), (200, 30, 30)).convert("YCbCr"), "TIFF"))[0]
    assert np.abs(np.subtract(mixed, (200, 30, 30))).max() <= 2
    lab = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (255, 128, 128)])
    # White of 8-bit L*a*b*, whose steps are wider than those of RGB.
    assert np.subtract(255, row(encode(lab, "TIFF"))).max() <= 1


PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
TURNED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PIXELS),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_is_applied(kind, orientation):
    # Blocks of 16 pixels, which lossy formats keep whole.
    stored = Image.fromarray(PIXELS.repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    image = open_image(encode(stored, kind, exif=exif, **options.get(kind, {})))
    shown = np.asarray(image)[8::16, 8::16].astype(int)
    assert shown.shape == TURNED[orientation].shape
    # Two conversions between RGB and YCbCr, each rounding; PNG, TIFF and WebP keep every bit.
    assert np.abs(shown - TURNED[orientation]).max() <= (3 if kind in ("JPEG", "AVIF") else 0)
    assert image.getexif() == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_leave_the_pixels():
    content = encode(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(8))
    assert np.array_equal(np.asarray(open_image(content)), PIXELS)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "SGI", "AVIF"])
def test_formats_that_pillow_opens_are_read(kind, tmp_path):
    suffix = next(suffix for suffix, name in Image.registered_extensions().items() if name == kind)
    assert suffix in image_suffixes()
    path = tmp_path / f"it{suffix}"
    path.write_bytes(encode(Image.new("RGB", (16, 16), (255, 255, 255)), kind))
    assert np.asarray(open_image(path)).min() >= 254
    assert open_image(str(path)).size == (16, 16)


def test_postscript_is_no_image(monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: started.append(args))
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n"
    with pytest.raises(UnreadableImage, match=r"cannot read image it\.jpg: no image, or of a format that is not read"):
        open_image(header, "it.jpg")
    assert not started
    assert ".eps" not in image_suffixes()
    assert not has_image_header(header[:16])
    assert not has_image_header(b"x")
    assert has_image_header(encode(Image.new("L", (4, 4)), "WEBP")[:16])


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name, message in {"fifo": "not a regular file", "loop": "symbolic", "device": "not a regular file"}.items():
        with pytest.raises(UnreadableImage, match=f"cannot read image .*{name}.jpg: .*{message}"):
            open_image(tmp_path / f"{name}.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        open_image(tmp_path)


def test_damaged_images_and_bombs_are_named(monkeypatch):
    content = encode(Image.new("RGB", (30, 30), (9, 9, 9)), "PNG")
    with pytest.raises(UnreadableImage, match="cannot read image it: "):
        open_image(content[:60], "it")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 449)
    with pytest.raises(UnreadableImage, match=r"cannot read image it: .*exceeds limit of 898 pixels"):
        open_image(content, "it")
