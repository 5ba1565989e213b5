"""Linear dynamics: what can be solved exactly, or nearly, when the network is linear."""
