"""What people read of a run: metrics by release class, report, dataset card, the published folder and its check."""
