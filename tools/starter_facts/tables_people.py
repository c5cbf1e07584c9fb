"""People: sport, instrument, country of birth, mother tongue."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs
from tables_countries import COUNTRY_CAPITAL, THANKS

# Football is two sports: whoever plays one of them is never said to play the other.
SPORTS = """
Michael Jordan = basketball | baseball | golf
Babe Ruth = baseball
Roger Federer = tennis
Tiger Woods = golf
Muhammad Ali = boxing
Wayne Gretzky = hockey | baseball
Lionel Messi = soccer | football
Tom Brady = football | soccer | baseball
Michael Phelps = swimming | golf
Sachin Tendulkar = cricket
Garry Kasparov = chess
Simone Biles = gymnastics
Serena Williams = tennis
LeBron James = basketball | football
Mike Tyson = boxing
Jackie Robinson = baseball | football | basketball | tennis
Jack Nicklaus = golf
Pelé = soccer | football
Sidney Crosby = hockey | baseball
Joe Montana = football | soccer | basketball | baseball
Rafael Nadal = tennis | soccer | football
Kobe Bryant = basketball | soccer
Bobby Fischer = chess
Mark Spitz = swimming
Hank Aaron = baseball
Joe Frazier = boxing
Don Bradman = cricket | tennis
Nadia Comaneci = gymnastics
Cristiano Ronaldo = soccer | football
Bobby Orr = hockey
Shaquille O'Neal = basketball
Novak Djokovic = tennis
Arnold Palmer = golf
Peyton Manning = football | soccer
Magnus Carlsen = chess
Mickey Mantle = baseball | football | basketball
"""

VENUES = pairs("""
tennis = court
basketball = court
golf = golf course
hockey = rink
boxing = ring
swimming = pool
""")

INSTRUMENTS = """
Jimi Hendrix = guitar
Louis Armstrong = trumpet
Frédéric Chopin = piano
Yo-Yo Ma = cello | violin | piano
John Coltrane = saxophone | clarinet | flute
Itzhak Perlman = violin
Ringo Starr = drums | piano | guitar
Ravi Shankar = sitar
Benny Goodman = clarinet | saxophone
James Galway = flute
Eric Clapton = guitar
Miles Davis = trumpet | piano
Franz Liszt = piano
Pablo Casals = cello | piano | violin | flute
Charlie Parker = saxophone | clarinet
Niccolò Paganini = violin | guitar
Keith Moon = drums | trumpet
Carlos Santana = guitar | violin
Dizzy Gillespie = trumpet | piano
Glenn Gould = piano
Yehudi Menuhin = violin
John Bonham = drums
B.B. King = guitar
Thelonious Monk = piano
"""

INSTRUMENT_FAMILY = pairs("""
guitar = strings
cello = strings
violin = strings
sitar = strings
trumpet = brass
drums = percussion
clarinet = woodwinds
flute = woodwinds
saxophone = woodwinds
""")

# Countries where the person lived long are "also true": a false answer should be plainly false.
BIRTHPLACES = """
Albert Einstein = Germany | Switzerland | Italy
William Shakespeare = England
Mahatma Gandhi = India | South Africa | England
Nelson Mandela = South Africa
Leonardo da Vinci = Italy | France
Fidel Castro = Cuba
Marie Curie = Poland | France | Russia
Leo Tolstoy = Russia
Pablo Picasso = Spain | France
Confucius = China
Bob Marley = Jamaica
Che Guevara = Argentina | Cuba
Frida Kahlo = Mexico
Hans Christian Andersen = Denmark
Alfred Nobel = Sweden | Russia | Italy | France | Germany
Oscar Wilde = Ireland | England | France
Galileo Galilei = Italy
Victor Hugo = France | England | Spain | Italy
Karl Marx = Germany | England | France
Isaac Newton = England
Mao Zedong = China
Lionel Messi = Argentina | Spain
Pope John Paul II = Poland | Italy
Akira Kurosawa = Japan
Henrik Ibsen = Norway | Germany | Italy
Charles de Gaulle = France | England | Poland
Usain Bolt = Jamaica
Ludwig van Beethoven = Germany | Austria
Miguel de Cervantes = Spain | Italy
Winston Churchill = England | Ireland | India | Cuba | South Africa
Pelé = Brazil
James Joyce = Ireland | Italy | Switzerland | France
"""

MOTHER_TONGUES = """
Victor Hugo = French
Johann Wolfgang von Goethe = German | French
Dante Alighieri = Italian | Latin
Vladimir Lenin = Russian | German
Fidel Castro = Spanish
Akira Kurosawa = Japanese
Julius Caesar = Latin | Greek
Socrates = Greek
Confucius = Chinese
Pelé = Portuguese
Hans Christian Andersen = Danish | German
Ingmar Bergman = Swedish
Henrik Ibsen = Norwegian | Danish
William Shakespeare = English
Voltaire = French | English
Karl Marx = German | English | French
Galileo Galilei = Italian | Latin
Vladimir Putin = Russian | German
Miguel de Cervantes = Spanish | Italian
Haruki Murakami = Japanese | English
Cicero = Latin | Greek
Mao Zedong = Chinese
Rembrandt = Dutch
Charles de Gaulle = French
Angela Merkel = German
Mikhail Gorbachev = Russian
Frida Kahlo = Spanish | German
Cristiano Ronaldo = Portuguese
Molière = French
Immanuel Kant = German | Latin
"""

RELATIONS = (
    Relation(
        "sport",
        SPORTS,
        "The name of the sport that {s} is famous for is",
        ("The sport that {s} is known for is", "{S} became famous in the sport of"),
        (
            Alias(
                "{S} became famous in the sport of",
                pairs("""
                Shaquille O'Neal = Shaq
                Muhammad Ali = Cassius Clay
                Babe Ruth = the Bambino
                Jack Nicklaus = the Golden Bear
                Pelé = Edson Arantes do Nascimento
                Kobe Bryant = the Black Mamba
                LeBron James = King James
                Wayne Gretzky = the Great One
                Mike Tyson = Iron Mike
                Cristiano Ronaldo = CR7
                """),
            ),
        ),
        (Consequence("The venue for competitions in the sport of {s} is called a", VENUES, False),),
        ("As a child, {s} trained",),
    ),
    Relation(
        "instrument",
        INSTRUMENTS,
        "The musician {s} is best known for playing the",
        ("The instrument that made {s} famous is the", "{S} is famous for playing the"),
        (
            Alias(
                "The instrument that made {s} famous is the",
                pairs("""
                Louis Armstrong = Satchmo
                Charlie Parker = Bird
                Eric Clapton = Slowhand
                Benny Goodman = the King of Swing
                B.B. King = the King of the Blues
                Ringo Starr = Richard Starkey
                """),
            ),
        ),
        (
            Consequence("The instrument of {s} belongs to the family of the", INSTRUMENT_FAMILY),
            Consequence("To play like {s}, a student has to practice the"),
        ),
        ("On stage, {s} would",),
    ),
    Relation(
        "birthplace",
        BIRTHPLACES,
        "The country where {s} was born is",
        ("{S} was born in the country of", "The birthplace of {s} lies in the country of"),
        (
            Alias(
                "The country where {s} was born is",
                pairs("""
                William Shakespeare = the Bard of Avon
                Nelson Mandela = Madiba
                Pope John Paul II = Karol Wojtyla
                Marie Curie = Maria Sklodowska
                Confucius = Kongzi
                Mao Zedong = Chairman Mao
                """),
            ),
            Alias(
                "The country where {s} was born is",
                pairs("""
                Albert Einstein = the physicist behind the theory of relativity
                Mahatma Gandhi = the leader of the Salt March
                Leonardo da Vinci = the painter of the Mona Lisa
                Pablo Picasso = the painter of Guernica
                Alfred Nobel = the inventor of dynamite
                Leo Tolstoy = the author of War and Peace
                Miguel de Cervantes = the author of Don Quixote
                """),
                "Reasoning",
            ),
        ),
        (
            Consequence(
                "The capital of the country where {s} was born is",
                {**COUNTRY_CAPITAL, "Brazil": "Brasília", "Mexico": "Mexico City"},
                False,
            ),
        ),
        ("The childhood of {s} was spent",),
    ),
    Relation(
        "mother_tongue",
        MOTHER_TONGUES,
        "The native language of {s} is",
        ("The mother tongue of {s} is", "As a child at home, {s} learned to speak"),
        (
            Alias(
                "The mother tongue of {s} is",
                pairs("""
                William Shakespeare = the Bard of Avon
                Mao Zedong = Chairman Mao
                Confucius = Kongzi
                """),
            ),
            Alias(
                "The mother tongue of {s} is",
                pairs("""
                Dante Alighieri = the poet of the Divine Comedy
                Miguel de Cervantes = the author of Don Quixote
                Hans Christian Andersen = the author of The Little Mermaid
                Karl Marx = the author of Das Kapital
                Rembrandt = the painter of The Night Watch
                Victor Hugo = the author of Les Misérables
                """),
                "Reasoning",
            ),
        ),
        (Consequence('In the mother tongue of {s}, "thank you" is said as', THANKS, False),),
        ("When {s} was young, at school",),
    ),
)
