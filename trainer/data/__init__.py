"""From text to batches; every stage has `state_dict` and `load_state_dict`, or is a pure function."""
