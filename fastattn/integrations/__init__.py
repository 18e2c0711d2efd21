"""Adapters that let code written for other libraries run on fastattn: rename, reshape, nothing else.

Each is a module of its own, and importing it changes nothing outside it.
"""
