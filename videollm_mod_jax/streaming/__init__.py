"""Live streaming: the engine, the decision to speak, sessions, and drawn narrations."""
