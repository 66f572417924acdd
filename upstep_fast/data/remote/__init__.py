"""Files on other machines, by fsspec: addresses, downloads, and the local cache of what was read."""
