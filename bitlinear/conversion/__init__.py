"""The parts of ``bitlinear.convert`` and ``bitlinear.deploy``; the calls are in ``convert.py``."""
