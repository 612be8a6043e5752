"""A task of one's own: the mean of the last prices, kept over restarts, in one file."""

from nightdesk import Task, TaskContext


class MeanContext(TaskContext):
    symbol: str
    venue: str
    prices: list[str] = []


class MeanPrice(Task[MeanContext]):
    """Remembers the last 60 mid prices."""

    context_class = MeanContext
    runs_in = "background"

    async def _handle_executing(self) -> None:
        quote = self.desk.price(self.context.symbol, self.context.venue)
        if quote is not None:
            mid = (quote.bid + quote.ask) / 2
            self.evolve_context(prices=[*self.context.prices, str(mid)][-60:])
        self.wait(1.0)
