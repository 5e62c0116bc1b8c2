"""Declaring an operator twice is an error, so doctest collection must not import this file under a second name."""

collect_ignore = ["torchvision_cpu.py"]
