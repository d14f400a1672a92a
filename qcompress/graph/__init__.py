"""The float program: tracing it, its operators, layers and activation sites."""
