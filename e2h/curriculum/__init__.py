"""The method, a file a stage: central images, warm-up, DP-SGD, synthesis. Runs in process; knows no Ray."""
