"""Train, decide, compact and measure: the runs behind `fastgate train`."""
