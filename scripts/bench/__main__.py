"""``python -m scripts.bench``: the benchmark, see benchmark.py."""

from scripts.bench.benchmark import main

raise SystemExit(main())
