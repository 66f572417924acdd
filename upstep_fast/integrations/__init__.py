"""Bridges into other people's libraries; each is imported only when it is used."""
