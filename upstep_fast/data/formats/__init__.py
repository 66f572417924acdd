"""Readers of formats beyond photographs, one module each, by kept libraries that extras install.

Each module has two functions:

    layout(file: File) -> Layout               from the header alone
    read(file: File, piece: Piece) -> Stored   one picture, or a window of it

Both raise BadImage with the reason.
"""
