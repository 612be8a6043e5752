"""The matcher behind the paper venue: orders against a feed, deterministic, without clock or loop.

Every input carries its time, every output is a statement row, and rows are the only thing that
changes orders, balances and numbers: replaying them (`restore`) builds the same engine again.

What it promises, against the mistakes paper exchanges are known for: nothing fills at a last price,
nothing fills beyond what the feed shows, no shown unit fills twice, a stale market fills nothing, a
resting order waits for the queue that stood before it, and one public trade is spent once.

Comes from: venues/paper.py
Goes to: venues/paper.py
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from heapq import heappop, heappush
from typing import Any, Literal

from nightdesk.market.admission import lock_rate, refusal, short_of_funds, terms
from nightdesk.market.listing import Listing
from nightdesk.market.resting import Working
from nightdesk.market.state import VenueState
from nightdesk.model.events import BookChanged, QuoteChanged, TradePrinted
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import (
    Fill,
    Liquidity,
    Order,
    OrderStatus,
    Side,
    TimeInForce,
    VenueOrder,
)
from nightdesk.model.statement import (
    CancelRefused,
    Deposited,
    Ended,
    Placed,
    Refused,
    StatementRow,
    Traded,
    Triggered,
    TriggerMoved,
)

__all__ = ["ClientIdRule", "MatchingEngine"]

ClientIdRule = Literal["forever", "open", "none"]
Refusal = tuple[str, str]
_NOTHING = Decimal(0)
_AT_ONCE = (TimeInForce.IOC, TimeInForce.FOK)


class MatchingEngine:
    """Matches orders of our own against the market that a feed shows.

    Market orders take what is shown, level by level; the rest waits for the quotes of the next
    `market_patience_s` and is then cancelled (`NO_LIQUIDITY`). Resting orders fill when a quote
    crosses them (up to the shown quantity, at their price), when trades reach them after their
    queue, or when a trade goes through their price. Our own orders never meet each other.
    `reduce_only` is kept at every fill: never more than the position, and the rest is cancelled
    when the position is gone.

    Args:
        venue: Stands in fills.
        instruments: What may be traded; spot.
        client_ids: Whether a client order id may come only once (`forever`), once among `open`
            orders (Binance), or as often as one likes (`none`).
        check_funds: False lets balances go negative (short selling without a loan).
        stale_after_s: An older market fills nothing.
        market_patience_s: How long the rest of a market order waits.
        max_open_orders: More are refused (`TOO_MANY_ORDERS`).
        history: Finished orders and fills that stay known to look-ups; the statement keeps all.
    """

    def __init__(
        self,
        venue: str,
        instruments: Iterable[Instrument],
        *,
        client_ids: ClientIdRule = "forever",
        check_funds: bool = True,
        stale_after_s: float = 120.0,
        market_patience_s: float = 3.0,
        max_open_orders: int = 10_000,
        history: int = 200_000,
    ) -> None:
        self.venue = venue
        self.unknown_symbols = 0
        self._client_ids = client_ids
        self._check_funds = check_funds
        self._stale_after_ns = round(stale_after_s * 1e9)
        self._patience_ns = round(market_patience_s * 1e9)
        self._max_open = max_open_orders
        self._markets = {
            instrument.symbol: Listing(instrument) for instrument in instruments
        }
        self._state = VenueState(
            {m.instrument.symbol: m.instrument for m in self._markets.values()}, history
        )
        self._deadlines: list[tuple[int, int, str]] = []
        self._now = 0
        self._rows: list[StatementRow] = []

    # Inputs ----------------------------------------------------------------------------------------

    def deposit(
        self, ts_ns: int, balances: Mapping[str, Decimal], account: str = "main"
    ) -> list[StatementRow]:
        """Put money into an account."""
        self._begin(ts_ns)
        for asset, quantity in balances.items():
            self._write(Deposited, account, asset=asset, quantity=quantity)
        return self._end()

    def submit(
        self, ts_ns: int, order: Order, account: str = "main"
    ) -> list[StatementRow]:
        """Take an order: the first row that names it is `Placed` or `Refused`, then comes what it met at once."""
        self._begin(ts_ns)
        request = order.request
        refused, rate = self._refusal(order, account), _NOTHING
        if not refused and self._check_funds:
            market = self._markets[request.symbol]
            rate = lock_rate(request, market.instrument, market.shown)
            accounts = self._state.accounts
            refused = short_of_funds(
                request, market.instrument, rate, account, accounts
            )
        if refused:
            self._refuse(
                Refused, order.client_order_id, request.symbol, account, refused
            )
            return self._end()
        working = self._place(order, account, rate)
        if working.awake:
            self._work(working)
        return self._end()

    def cancel(
        self, ts_ns: int, client_order_id: str, account: str = "main"
    ) -> list[StatementRow]:
        """Cancel the open order of this client id; a `CancelRefused` row says why that cannot be."""
        self._begin(ts_ns)
        order = self._state.of_client(client_order_id)
        if order is None or order.account != account:
            self._refuse(
                CancelRefused,
                client_order_id,
                "",
                account,
                ("UNKNOWN_ORDER", "no such order"),
            )
        elif order.status.is_terminal:
            why = ("ORDER_NOT_OPEN", f"order is {order.status}")
            self._refuse(CancelRefused, client_order_id, order.symbol, account, why)
        else:
            self._finish(order, OrderStatus.CANCELED, "REQUESTED")
        return self._end()

    def on_quote(self, ts_ns: int, quote: QuoteChanged) -> list[StatementRow]:
        """Take in the best bid and ask."""
        market = self._market(quote.symbol)
        if market is None:
            return []
        self._begin(ts_ns)
        market.shown.on_quote(self._now, quote)
        if not market.is_idle:
            market.buys.update_queues(market.shown)
            market.sells.update_queues(market.shown)
            self._react(market)
        return self._end()

    def on_book(self, ts_ns: int, change: BookChanged) -> list[StatementRow]:
        """Take in changed levels of the book."""
        market = self._market(change.symbol)
        if market is None:
            return []
        self._begin(ts_ns)
        if market.shown.on_book(self._now, change) and not market.is_idle:
            for side, levels in ((Side.BUY, change.bids), (Side.SELL, change.asks)):
                resting = market.resting(side)
                prices = (
                    resting.prices()
                    if change.is_snapshot
                    else [price for price, _ in levels]
                )
                resting.update_queues(market.shown)
                resting.update_queues(market.shown, prices)
            self._react(market)
        return self._end()

    def on_trade(self, ts_ns: int, trade: TradePrinted) -> list[StatementRow]:
        """Take in a public trade."""
        market = self._market(trade.symbol)
        if market is None or market.is_repeated(trade.trade_id):
            return []
        self._begin(ts_ns)
        reached = market.resting(trade.side.opposite)
        for order, share in reached.hit(trade.price, trade.quantity):
            if order.venue_order_id in market.eager:
                self._fill(order, share, trade.price, Liquidity.TAKER)
            else:
                assert order.price is not None
                self._fill(order, share, order.price, Liquidity.MAKER)
        if market.eager or not self._is_fresh(market):
            self._update_eager(market, trade.price)
        return self._end()

    def advance(self, ts_ns: int) -> list[StatementRow]:
        """Let time pass: expire what is due."""
        self._begin(ts_ns)
        return self._end()

    def restore(self, rows: Iterable[StatementRow]) -> None:
        """Rebuild orders, balances and numbers from a statement, whichever row it ends with.

        Queues are not in the statement: what the feed shows next at a price all stands ahead of us.

        Raises:
            ValueError: The statement is not of this venue's instruments, or has a gap.
        """
        self._state.restore(rows)
        for order in self._state.open.values():
            self._index(order)
            if not order.awake:
                continue
            if order.may_rest:
                self._rest(self._markets[order.symbol], order, is_fresh=False)
            else:  # cut off by the crash although it must not rest: it ends with the next input
                self._wake_at(0, order)

    # Questions -------------------------------------------------------------------------------------

    @property
    def next_deadline_ns(self) -> int | None:
        """When `advance` has something to do, or None."""
        while self._deadlines and self._deadlines[0][2] not in self._state.open:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def sequence(self) -> int:
        """Rows written so far."""
        return self._state.sequence

    def find(self, client_order_id: str) -> VenueOrder | None:
        """Return the newest order of this client id."""
        order = self._state.of_client(client_order_id)
        return order.report(self.venue) if order else None

    def placed_ns(self, venue_order_id: str) -> int:
        """Return when an order was accepted; 0 if it is no longer remembered."""
        order = self._state.orders.get(venue_order_id)
        return order.placed_ns if order else 0

    def open_orders(self) -> list[VenueOrder]:
        return [order.report(self.venue) for order in self._state.open.values()]

    def fills(self, since_ns: int = 0) -> list[Fill]:
        return [fill for fill in self._state.fills if fill.ts_event_ns >= since_ns]

    def balances(self, account: str = "main") -> dict[str, Decimal]:
        """Return totals by asset, locked money included."""
        return self._state.accounts.totals(account)

    def locked(self, account: str = "main") -> dict[str, Decimal]:
        """Return what open orders set aside, by asset."""
        return self._state.accounts.locked(account)

    def stats(self) -> dict[str, Any]:
        return {
            "rows": self._state.sequence,
            "orders": self._state.order_number,
            "trades": self._state.trade_number,
            "open": len(self._state.open),
            "book_gaps": sum(
                market.shown.book.gaps for market in self._markets.values()
            ),
            "unknown_symbols": self.unknown_symbols,
        }

    # Admission -------------------------------------------------------------------------------------

    def _refusal(self, order: Order, account: str) -> Refusal | None:
        request = order.request
        market = self._markets.get(request.symbol)
        if market is None:
            return (
                "UNKNOWN_SYMBOL",
                f"no instrument {request.symbol!r}. Known: {', '.join(self._markets)}",
            )
        if self._is_taken(order.client_order_id):
            return (
                "DUPLICATE_CLIENT_ORDER_ID",
                f"client order id {order.client_order_id!r} was used before",
            )
        if len(self._state.open) >= self._max_open:
            return "TOO_MANY_ORDERS", f"{self._max_open} orders are open already"
        refused = refusal(
            self._now, request, market.instrument, market.shown, self._is_fresh(market)
        )
        if refused or not request.reduce_only:
            return refused
        if self._reducible(market.instrument, account, request.side) <= 0:
            why = f"there is nothing for a {request.side} to reduce"
            return "REDUCE_ONLY_WOULD_INCREASE_POSITION", why
        return None

    def _is_taken(self, client_order_id: str) -> bool:
        if self._client_ids == "none":
            return False
        known = self._state.by_client.get(client_order_id)
        return known is not None and (
            self._client_ids == "forever" or known in self._state.open
        )

    def _place(self, order: Order, account: str, rate: Decimal) -> Working:
        venue_order_id = str(self._state.order_number + 1)
        self._write(
            Placed,
            account,
            venue_order_id=venue_order_id,
            client_order_id=order.client_order_id,
            lock_rate=rate,
            **terms(order.request, self._markets[order.request.symbol].shown),
        )
        working = self._state.orders[venue_order_id]
        self._index(working)
        return working

    def _index(self, order: Working) -> None:
        market = self._markets[order.symbol]
        if not order.awake:
            market.sleeping[order.venue_order_id] = order
        if order.reduce_only:
            market.reducing[order.venue_order_id] = order
        if order.expire_ns is not None:
            self._wake_at(order.expire_ns, order)

    # Matching --------------------------------------------------------------------------------------

    def _work(self, order: Working) -> None:
        """Let an order that is awake take what is shown, then rest, wait or end."""
        market = self._markets[order.symbol]
        is_fresh = self._is_fresh(market)
        if is_fresh:
            if order.time_in_force is TimeInForce.FOK and not self._could_fill(
                market, order
            ):
                self._finish(order, OrderStatus.CANCELED, "FOK_NOT_FILLABLE")
                return
            self._take(market, order)
        if order.status.is_terminal:
            return
        if order.may_rest:
            self._rest(market, order, is_fresh)
        elif order.price is not None or order.time_in_force in _AT_ONCE:
            self._finish(order, OrderStatus.CANCELED, f"{order.time_in_force}_REST")
        else:
            market.hungry[order.venue_order_id] = order
            self._wake_at(self._now + self._patience_ns, order)

    def _rest(self, market: Listing, order: Working, is_fresh: bool) -> None:
        assert order.price is not None
        best = market.shown.best(order.side.opposite)
        if is_fresh:
            order.ahead = market.shown.quantity(order.side, order.price)
        if not is_fresh or (
            best is not None and (order.price - best) * order.side.sign >= 0
        ):
            market.eager[order.venue_order_id] = order
        market.resting(order.side).add(order)

    def _react(self, market: Listing) -> None:
        """Answer a market that has just changed: stops first, then whatever can trade now."""
        if not self._is_fresh(market):
            return
        for order in list(market.sleeping.values()):
            self._maybe_trigger(market, order)
        for order in list(market.hungry.values()):
            self._take(market, order)
        reached = self._reached(market)
        for order in reached:
            self._take(market, order, as_maker=order.venue_order_id not in market.eager)
        if reached or market.eager:
            self._update_eager(market)

    def _update_eager(self, market: Listing, traded: Decimal | None = None) -> None:
        """Find out which orders stand at or beyond the other side; without quotes, beyond the last trade."""
        if self._is_fresh(market):
            reached = self._reached(market)
        elif traded is not None:
            near = market.buys.reached(traded) + market.sells.reached(traded)
            reached = [order for order in near if order.price != traded]
        else:
            reached = []
        market.eager = {order.venue_order_id: order for order in reached}

    def _reached(self, market: Listing) -> list[Working]:
        """Return the resting orders that the other side of the market stands at or beyond."""
        ask, bid = market.shown.best(Side.SELL), market.shown.best(Side.BUY)
        buys = market.buys.reached(ask) if ask is not None else []
        return buys + (market.sells.reached(bid) if bid is not None else [])

    def _take(self, market: Listing, order: Working, *, as_maker: bool = False) -> None:
        """Fill `order` from what is shown. As the maker it trades at its own price."""
        liquidity = Liquidity.MAKER if as_maker else Liquidity.TAKER
        for shown_price, shown in self._offers(market, order):
            if order.status.is_terminal:
                return
            price = order.price if as_maker and order.price is not None else shown_price
            wanted = min(shown, self._wanted(order))
            quantity = self._affordable(order, wanted, price)
            if quantity > 0:
                market.shown.take(order.side, shown_price, quantity)
                self._fill(order, quantity, price, liquidity)
            if quantity < wanted and not order.status.is_terminal:
                self._finish(order, OrderStatus.CANCELED, "INSUFFICIENT_BALANCE")

    def _offers(self, market: Listing, order: Working) -> list[tuple[Decimal, Decimal]]:
        """Return the shown levels, in whole lots, that cover what the order still wants."""
        needed = self._wanted(order)
        offers = []
        for price, shown in market.shown.against(order.side, order.price):
            if needed <= 0:
                break
            enough = shown >= needed
            quantity = needed if enough else market.instrument.floor_quantity(shown)
            if quantity > 0:
                needed -= quantity
                offers.append((price, quantity))
        return offers

    def _could_fill(self, market: Listing, order: Working) -> bool:
        return (
            sum((quantity for _, quantity in self._offers(market, order)), _NOTHING)
            >= order.remaining
        )

    def _wanted(self, order: Working) -> Decimal:
        if not order.reduce_only:
            return order.remaining
        return min(
            order.remaining,
            self._reducible(order.instrument, order.account, order.side),
        )

    def _reducible(self, instrument: Instrument, account: str, side: Side) -> Decimal:
        return instrument.floor_quantity(
            self._state.accounts.reducible(account, instrument.symbol, side)
        )

    def _affordable(self, order: Working, quantity: Decimal, price: Decimal) -> Decimal:
        """Only a market BUY can find the market dearer than what it set aside."""
        if not self._check_funds or order.side is Side.SELL or order.price is not None:
            return quantity
        instrument = order.instrument
        fee = (
            max(instrument.taker_fee, _NOTHING)
            if instrument.fee_in == "quote"
            else _NOTHING
        )
        funds = (
            self._state.accounts.free(order.account, instrument.quote)
            + order.lock_rate * order.remaining
        )
        unit = price * (1 + fee)
        return (
            quantity
            if quantity * unit <= funds
            else max(_NOTHING, instrument.floor_quantity(funds / unit))
        )

    def _fill(
        self, order: Working, quantity: Decimal, price: Decimal, liquidity: Liquidity
    ) -> None:
        instrument = order.instrument
        wanted = self._wanted(order)
        quantity = wanted if wanted <= quantity else instrument.floor_quantity(quantity)
        if quantity <= 0:
            return
        tick = instrument.tick_size
        if not price.same_quantum(tick) and not price % tick:
            price = price.quantize(tick)  # feeds pad with zeros; digits are not endless
        rate = (
            instrument.maker_fee
            if liquidity is Liquidity.MAKER
            else instrument.taker_fee
        )
        in_base = instrument.fee_in == "base" and order.side is Side.BUY
        fill = Fill(
            venue=self.venue,
            symbol=instrument.symbol,
            trade_id=str(self._state.trade_number + 1),
            venue_order_id=order.venue_order_id,
            client_order_id=order.client_order_id,
            side=order.side,
            quantity=quantity,
            price=price,
            fee=rate * quantity if in_base else rate * quantity * price,
            fee_asset=instrument.base if in_base else instrument.quote,
            liquidity=liquidity,
            ts_event_ns=self._now,
        )
        self._write(Traded, order.account, fill=fill)
        market = self._markets[instrument.symbol]
        if order.status.is_terminal:
            market.forget(order)
        for other in list(market.reducing.values()):
            if self._reducible(instrument, other.account, other.side) <= 0:
                self._finish(other, OrderStatus.CANCELED, "REDUCE_ONLY")

    def _maybe_trigger(self, market: Listing, order: Working) -> None:
        best = market.shown.best(order.side.opposite)
        if best is None or order.trigger_price is None or order.status.is_terminal:
            return
        sign = order.side.sign
        if (best - order.trigger_price) * sign >= 0:
            self._write(Triggered, order.account, venue_order_id=order.venue_order_id)
            del market.sleeping[order.venue_order_id]
            self._work(order)
        elif order.trail is not None:
            followed = market.instrument.passive_price(
                order.side.opposite, best + order.trail * sign
            )
            if (order.trigger_price - followed) * sign > 0:
                self._write(
                    TriggerMoved,
                    order.account,
                    venue_order_id=order.venue_order_id,
                    trigger_price=followed,
                )

    # Ends ------------------------------------------------------------------------------------------

    def _wake_at(self, ts_ns: int, order: Working) -> None:
        heappush(
            self._deadlines, (ts_ns, int(order.venue_order_id), order.venue_order_id)
        )

    def _expire(self) -> None:
        while (due := self.next_deadline_ns) is not None and due <= self._now:
            order = self._state.open[heappop(self._deadlines)[2]]
            if order.expire_ns is not None and order.expire_ns <= self._now:
                self._finish(order, OrderStatus.EXPIRED, "GTD")
            else:
                self._finish(
                    order, OrderStatus.CANCELED, "NO_LIQUIDITY" if due else "RESTARTED"
                )

    def _finish(self, order: Working, status: OrderStatus, reason: str) -> None:
        self._write(
            Ended,
            order.account,
            venue_order_id=order.venue_order_id,
            client_order_id=order.client_order_id,
            symbol=order.symbol,
            status=status,
            filled_quantity=order.filled,
            reason=reason,
        )
        self._markets[order.symbol].forget(order)

    def _refuse(
        self,
        kind: type[Refused] | type[CancelRefused],
        client_order_id: str,
        symbol: str,
        account: str,
        why: Refusal,
    ) -> None:
        self._write(
            kind,
            account,
            client_order_id=client_order_id,
            symbol=symbol,
            code=why[0],
            reason=why[1],
        )

    # Rows ------------------------------------------------------------------------------------------

    def _begin(self, ts_ns: int) -> None:
        self._now = max(self._now, ts_ns)
        self._rows = []
        if self._deadlines:
            self._expire()

    def _end(self) -> list[StatementRow]:
        rows, self._rows = self._rows, []
        return rows

    def _write(self, kind: type[StatementRow], account: str, **facts: Any) -> None:
        row = kind(
            sequence=self._state.sequence + 1, ts_ns=self._now, account=account, **facts
        )
        self._state.apply(row)
        self._rows.append(row)

    def _market(self, symbol: str) -> Listing | None:
        market = self._markets.get(symbol)
        if market is None:
            self.unknown_symbols += 1
        return market

    def _is_fresh(self, market: Listing) -> bool:
        return market.is_fresh(self._now, self._stale_after_ns)
