"""One model version at work: its queue, its ticks, the thread that runs them. Must not know sessions or grpc."""
