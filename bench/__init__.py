"""The numbers of docs/benchmarks.md: each module measures one subject and prints what the targets are compared with.

``python bench/NAME.py [--json]``. Nothing here is imported by the product.
"""
