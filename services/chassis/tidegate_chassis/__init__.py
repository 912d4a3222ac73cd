"""What every service needs to run, and knows no service: settings, server, channel, process, telemetry."""
