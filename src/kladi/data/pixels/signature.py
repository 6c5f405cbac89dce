"""Which format a file is, by its first bytes: the suffix is only an opinion."""

from __future__ import annotations

from pathlib import PurePath

READABLE = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff", ".btf", ".tf8"),
    "WebP": (".webp",),
    "JPEG 2000": (".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
    "NPY": (".npy",),
    "NPZ": (".npz",),
    "NIfTI": (".nii", ".nii.gz"),
    "DICOM": (".dcm", ".dicom", ".ima", ".dic", ""),
}
"""Format -> the suffixes that promise it."""

_LEADS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x93NUMPY", "NPY"),
    (b"PK\x03\x04", "NPZ"),
    (b"\x1f\x8b", "gzip"),
    # The rest is here to be named, not to be read.
    (b"%PDF", "PDF"),
    (b"\x7fELF", "program (ELF)"),
    (b"MZ", "program (PE)"),
    (b"\x80\x02", "Python pickle"),
    (b"\x80\x03", "Python pickle"),
    (b"\x80\x04", "Python pickle"),
    (b"\x80\x05", "Python pickle"),
    (b"\x89HDF", "HDF5"),
    (b"7z\xbc\xaf", "7z archive"),
    (b"Rar!", "RAR archive"),
    (b"SQLite", "SQLite database"),
    (b"8BPS", "Photoshop document"),
    (b"\x1a\x45\xdf\xa3", "Matroska video"),
    (b"NRRD", "NRRD"),
)
_WORDS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"{", "JSON"),
)


def kind_of(head: bytes) -> str:
    """The format of a file that begins with `head` (352 bytes suffice), or a name for what it is instead.

    DICOM is asked first: its preamble may hold anything, even the start of a program or of a TIFF.
    A file without preamble is DICOM when it begins with group 0002 or 0008.
    """
    if head[128:132] == b"DICM":
        return "DICOM"
    for lead, kind in _LEADS:
        if head.startswith(lead):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if _is_nifti(head):
        return "NIfTI"
    if _is_bare_dicom(head):
        return "DICOM"
    if head[4:8] == b"ftyp":
        return "MP4 or HEIF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for word, kind in _WORDS:
        if text.startswith(word):
            return kind
    if head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head[:256]):
        return "text"
    return "unknown"


def promised(path: str | PurePath) -> str | None:
    """The format that a suffix promises; None where it promises none."""
    name = str(path).casefold()
    for kind, suffixes in READABLE.items():
        if any(suffix and name.endswith(suffix) for suffix in suffixes):
            return kind
    return None


def _is_nifti(head: bytes) -> bool:
    if len(head) >= 348 and head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):  # 348
        return head[344:347] in (b"n+1", b"ni1")
    return head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") and head[4:7] in (b"n+2", b"ni2")  # 540


def _is_bare_dicom(head: bytes) -> bool:
    """Group 0002 or 0008 first, then a small element number, and a value representation or a modest length."""
    if len(head) < 8 or head[:4] == b"\0\0\0\0":
        return False
    little = head[0] in (2, 8) and head[1] == 0
    big = head[0] == 0 and head[1] in (2, 8)
    if not (little or big):
        return False
    element = head[3] if little else head[2]
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    length = int.from_bytes(head[4:8], "little" if little else "big")
    return element <= 0x10 and (explicit or length <= 0x400)
