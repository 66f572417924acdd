"""Addresses of files on other machines: s3://BUCKET/KEY, gs://, https://, hf://datasets/USER/NAME/FILE."""

from __future__ import annotations

import os
import re
from urllib.parse import urljoin, urlsplit

HTTP = ("http", "https")
OBJECTS = ("s3", "s3a", "gs", "gcs", "hf")  # stores that list what they hold
ZIP = "zip"  # zip://FOLDER::ADDRESS, a folder in a zip file, as fsspec writes it
PROTOCOLS = (*OBJECTS, *HTTP, ZIP)

_PROTOCOL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_USER = re.compile(r"(?<=://)[^/@?#]*@")
# values of signed addresses: AWS, Google, Azure, CloudFront and common names of tokens
_SECRET = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|signature|sig|policy|"
    r"key-pair-id|awsaccesskeyid|googleaccessid|access_token|token|api_?key|key|auth|password|secret)=)[^&#]+"
)


def protocol_of(path: str | bytes) -> str:
    """Return the protocol of an address; empty for a path on this machine."""
    match = _PROTOCOL.match(os.fsdecode(path))
    return match[1] if match else ""


def is_address(path: str | bytes) -> bool:
    """Return whether a path is an address of a kind that is read."""
    return protocol_of(path) in PROTOCOLS


def shown(address: str) -> str:
    """Return an address for names and messages: without a user, a password, or the values of signatures and tokens."""
    return _SECRET.sub(r"\1...", _USER.sub("", address))


def joined(root: str, name: str) -> str:
    """Return the address of `name`, which may be one itself, in the folder `root`."""
    if is_address(name):
        return name
    if protocol_of(root) in HTTP:
        return urljoin(f"{root.rstrip('/')}/", name)
    return f"{root.rstrip('/')}/{name.lstrip('/')}"


def folder_of(address: str) -> str:
    """Return the address of the folder that holds a file."""
    return address.split("?", 1)[0].rpartition("/")[0] if protocol_of(address) in HTTP else address.rpartition("/")[0]


def file_name_of(address: str) -> str:
    """Return the last component of an address, without the query of an http address."""
    path = urlsplit(address).path if protocol_of(address) in HTTP else address
    return path.rstrip("/").rpartition("/")[2]
