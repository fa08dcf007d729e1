"""What happens to parameters after calibration: what trains, through which gradient, and when things freeze."""
