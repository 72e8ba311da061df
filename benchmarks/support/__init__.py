"""What several benchmarks share: made-up `pictures`, a web server (`image_host`), and the `loader_sides` compared."""
