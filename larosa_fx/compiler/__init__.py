"""From Dynamo's graph to a compiled one: capture, passes, folded weights, the backend."""
