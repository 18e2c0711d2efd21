"""Operators: checks, defaults and autograd over the backends. One file a family."""
