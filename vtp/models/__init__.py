"""Networks: nn.Modules only, without losses, data or process groups."""
